"""Archives of cpio's newer form, as an initramfs has them."""

from collections.abc import Mapping


def member(name: str, data: bytes = b"") -> bytes:
    """Return the file *name* of an archive."""
    text = name.encode() + b"\0"
    numbers = [0, 0o100644, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(text), 0]
    head = b"070701" + b"".join(b"%08x" % number for number in numbers) + text
    return padded(padded(head) + data)


def archive(files: Mapping[str, bytes]) -> bytes:
    """Return an archive of *files*, up to a multiple of 512 bytes."""
    data = b"".join(member(name, data) for name, data in files.items()) + member("TRAILER!!!")
    return data + bytes(-len(data) % 512)


def padded(data: bytes) -> bytes:
    """Return *data* up to a multiple of 4 bytes."""
    return data + bytes(-len(data) % 4)

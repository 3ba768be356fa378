"""What is known of machines: architectures, firmware, KVM, libvirt, consoles, how many run at once."""

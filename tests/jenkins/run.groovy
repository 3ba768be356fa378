// Runs a Jenkinsfile with the steps of a Pipeline done as plainly as can be, for tests/test_jenkins.py.
//
// Usage: groovy run.groovy JENKINSFILE DIRECTORY PARAMETERS
// DIRECTORY is the root of all agents; PARAMETERS are the job's, as JSON. Commands really run. An hour of the step
// timeout is a second, and the file DIRECTORY/abort aborts the build. Each call of a step is a line of JSON on stdout.

import groovy.json.JsonOutput
import groovy.json.JsonSlurper
import org.codehaus.groovy.control.CompilerConfiguration
import org.codehaus.groovy.control.customizers.ImportCustomizer

import java.util.concurrent.locks.ReentrantLock

@interface NonCPS { }

/** What Jenkins interrupts a step with. */
class Interruption extends RuntimeException {
    Interruption(String message) { super(message) }
}

abstract class Pipeline extends Script {
    static File root
    // One for each branch, as in Jenkins.
    static final InheritableThreadLocal<Map> CONTEXT = new InheritableThreadLocal<Map>() {
        @Override
        protected Map childValue(Map parent) { new HashMap(parent) }
    }
    // Of the code one branch runs at a time, as in Jenkins; while its commands run the others go on.
    static final ReentrantLock CODE = new ReentrantLock()
    static final Set<String> TAKEN = [] as Set
    static final Set<String> ABORTED = [] as Set

    static void record(String step, Object detail) {
        // A method with @NonCPS can't call a step in Jenkins.
        List<String> plain = ['matching', 'summary', 'overview', 'details', 'outcome']
        if (Thread.currentThread().stackTrace.any { it.className == 'Jenkinsfile' && it.methodName in plain }) {
            throw new IllegalStateException("step ${step} in a method with @NonCPS")
        }
        println JsonOutput.toJson([step: step, branch: CONTEXT.get().branch, workspace: CONTEXT.get().workspace,
                                   detail: detail])
    }

    static Object inside(Map changes, Closure body) {
        Map before = CONTEXT.get()
        CONTEXT.set(before + changes)
        try {
            return body()
        } finally {
            CONTEXT.set(before)
        }
    }

    /** A workspace that is taken gets another name, as in Jenkins. */
    static Object inWorkspace(String name, Closure body) {
        String taken = name
        for (int number = 2; taken in TAKEN; number++) {
            taken = "${name}@${number}"
        }
        TAKEN << taken
        new File(root, taken).mkdirs()
        try {
            return inside([workspace: taken], body)
        } finally {
            TAKEN.remove(taken)
        }
    }

    File file(String name) { new File(new File(root, CONTEXT.get().workspace), name) }

    Object stage(String name, Closure body) {
        record('stage', name)
        return body()
    }

    Object node(String label, Closure body) {
        record('node', label)
        return inWorkspace('workspace/job', body)
    }

    Object ws(String name, Closure body) {
        return inWorkspace(name) {
            record('ws', name)
            body()
        }
    }

    Object withEnv(List variables, Closure body) {
        return inside([variables: (CONTEXT.get().variables ?: []) + variables*.toString()], body)
    }

    Object timeout(Map arguments, Closure body) {
        record('timeout', arguments)
        assert arguments.unit == 'HOURS'
        return inside([deadline: System.currentTimeMillis() + 1000 * arguments.time], body)
    }

    Object parallel(Map branches) {
        record('parallel', branches.keySet() as List)
        Map<String, Throwable> failures = [:]
        List<Thread> threads = branches.collect { String name, Closure body ->
            Thread.start {
                CONTEXT.set(CONTEXT.get() + [branch: name])
                CODE.lock()
                try {
                    body()
                } catch (Throwable failure) {
                    failures[name] = failure
                } finally {
                    CODE.unlock()
                }
            }
        }
        outsideOfCode { threads*.join() }
        if (failures) {
            throw failures.values().first()
        }
    }

    static void outsideOfCode(Closure body) {
        CODE.unlock()
        try {
            body()
        } finally {
            CODE.lock()
        }
    }

    Object sh(Map arguments) {
        record('sh', arguments)
        List<String> variables = System.getenv().collect { key, value -> "${key}=${value}".toString() }
        variables += CONTEXT.get().variables ?: []
        // A session of its own: what is stopped is the command with all that it started.
        Process process = ['setsid', '--wait', '/bin/sh', '-xe', '-c', arguments.script]
            .execute(variables, new File(root, CONTEXT.get().workspace))
        StringBuffer output = new StringBuffer()
        StringBuffer errors = new StringBuffer()
        // One reader for each, as another would close what this one reads.
        List<Thread> readers = [process.consumeProcessOutputStream(output), process.consumeProcessErrorStream(errors)]
        String stopped = null
        outsideOfCode {
            while (process.alive) {
                stopped = interruption()
                if (stopped) {
                    process.descendants().forEach { it.destroy() }
                    process.waitFor()
                }
                sleep(50)
            }
            readers*.join()
        }
        System.err.print(errors)
        if (stopped) {
            throw new Interruption(stopped)
        }
        if (arguments.returnStatus) {
            return process.exitValue()
        }
        if (process.exitValue() != 0) {
            throw new RuntimeException("script returned exit code ${process.exitValue()}")
        }
        if (arguments.returnStdout) {
            return output.toString()
        }
        System.err.print(output)
        return null
    }

    /** Why the branch is to stop. Aborting interrupts it once: what stands in finally is carried out. */
    static String interruption() {
        Map context = CONTEXT.get()
        if (new File(root, 'abort').exists()) {
            synchronized (ABORTED) {
                if (ABORTED.add(context.branch)) {
                    return 'aborted'
                }
            }
        }
        return context.deadline && System.currentTimeMillis() > context.deadline ? 'out of time' : null
    }

    boolean fileExists(String name) { file(name).exists() }

    String readFile(Map arguments) { file(arguments.file).getText(arguments.encoding) }

    void echo(String text) { record('echo', text) }

    void error(String text) {
        record('error', text)
        throw new RuntimeException(text)
    }

    /** Patterns as Ant has them, without directories. */
    List<String> matches(String patterns) {
        List<String> expressions = patterns.split(/\s*,\s*/).collect { String pattern ->
            pattern.split('\\*', -1).collect { java.util.regex.Pattern.quote(it) }.join('.*')
        }
        List<String> names = new File(root, CONTEXT.get().workspace).list() as List
        return names.findAll { String name -> expressions.any { name.matches(it) } }.sort()
    }

    void junit(Map arguments) {
        record('junit', arguments + [files: matches(arguments.testResults)])
        assert arguments.allowEmptyResults
    }

    void archiveArtifacts(Map arguments) {
        record('archiveArtifacts', arguments + [files: matches(arguments.artifacts)])
        assert arguments.allowEmptyArchive
    }
}

File source = new File(args[0])
Pipeline.root = new File(args[1])
Pipeline.CONTEXT.set([:])
Map build = [description: '']

CompilerConfiguration configuration = new CompilerConfiguration(scriptBaseClass: 'Pipeline')
ImportCustomizer imports = new ImportCustomizer()
imports.addImports('NonCPS')
configuration.addCompilationCustomizers(imports)
Map names = [params: new JsonSlurper().parseText(args[2]), env: [JOB_NAME: 'folder/job'], currentBuild: build]
Script script = new GroovyShell(getClass().classLoader, new Binding(names), configuration)
    .parse(source.text, 'Jenkinsfile.groovy')

int status = 0
Pipeline.CODE.lock()
try {
    script.run()
} catch (Throwable failure) {
    println JsonOutput.toJson([step: 'failed', detail: failure.message])
    status = 1
}
// Jenkins stores what methods with @NonCPS return, while a step runs.
ObjectOutputStream store = new ObjectOutputStream(new ByteArrayOutputStream())
store.writeObject(script.matching('[{"name": "image"}]', '.*'))
Pipeline.root.eachFileRecurse { File file ->
    if (file.name.endsWith('.record.json')) {
        store.writeObject(script.summary(file.text))
    }
}
println JsonOutput.toJson([step: 'description', detail: build.description.toString()])
System.exit(status)

//! A herd of `pgherd up` for a test: in a directory of its own, as root or as another user, and gone afterwards
//! whatever happens.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

/// What must have happened by then on two busy cores; the promise for a quiet machine is a minute to be healthy.
const SOON: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(50);

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Waits until `look` finds something.
#[track_caller]
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + SOON;
    loop {
        match look() {
            Ok(found) => return found,
            Err(why) if Instant::now() > deadline => panic!("waited {SOON:?} for {what}: {why}"),
            // sleep: between two looks at the condition
            Err(_) => std::thread::sleep(LOOK_EVERY),
        }
    }
}

pub(crate) struct Herd {
    /// Holds the herd's directory, the program and a home.
    base: tempfile::TempDir,
    pub(crate) dir: PathBuf,
    program: PathBuf,
    /// Whom the commands run as, if not as the test itself.
    user: Option<(u32, u32)>,
}

impl Herd {
    /// As the user of the test, in a directory that others can enter.
    pub(crate) fn new() -> Herd {
        Herd::at("herd", None)
    }

    /// Without root: as the user of the test or, where that is root, as postgres. The herd's directory lies so
    /// deep that no socket fits into it.
    pub(crate) fn of_an_ordinary_user() -> Herd {
        let postgres = || {
            let id = |flag| {
                let output = Command::new("id").args([flag, "postgres"]).output().unwrap();
                String::from_utf8(output.stdout).unwrap().trim().parse().expect("there is a user postgres")
            };
            (id("-u"), id("-g"))
        };
        Herd::at(&format!("deep/{}/herd", "x".repeat(90)), is_root().then(postgres))
    }

    fn at(below: &str, user: Option<(u32, u32)>) -> Herd {
        let base = tempfile::Builder::new().prefix("pgherd-it-").tempdir().unwrap();
        let (dir, program) = (base.path().join(below), base.path().join("pgherd"));
        // Where the checkout lies only its owner may be able to go.
        std::fs::copy(crate::repository::program().get_program(), &program).unwrap();
        std::fs::create_dir_all(dir.parent().unwrap()).unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(base.path(), open).unwrap();
        if let Some((uid, gid)) = user {
            for path in [base.path(), dir.parent().unwrap()] {
                std::os::unix::fs::chown(path, Some(uid), Some(gid)).unwrap();
            }
        }
        Herd { base, dir, program, user }
    }

    /// From now on commands are of another version, as far as anybody can tell: nothing reads what is behind a program's end.
    pub(crate) fn upgrade(&self) {
        let newer = self.base.path().join("newer");
        std::fs::copy(&self.program, &newer).unwrap();
        let mut file = std::fs::OpenOptions::new().append(true).open(&newer).unwrap();
        std::io::Write::write_all(&mut file, b"another version").unwrap();
        drop(file);
        std::fs::rename(newer, &self.program).unwrap();
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).current_dir(self.base.path()).stdin(Stdio::null()).env_clear();
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", self.base.path());
        command.env("PGHERD_DIR", &self.dir);
        if let Some((uid, gid)) = self.user {
            command.uid(uid).gid(gid);
        }
        command
    }

    pub(crate) fn output(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the program is there")
    }

    /// Runs it, fails the test if it fails, and returns what it printed on stdout.
    #[track_caller]
    pub(crate) fn run(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "pgherd {}: {}\n--- stdout\n{out}\n--- stderr\n{}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        out
    }

    /// The end of every log, for a failure.
    pub(crate) fn logs(&self) -> String {
        let mut text = String::new();
        let mut logs = vec![self.dir.join("log/supervisor.log"), self.dir.join("proxy/log/proxy.log")];
        logs.extend(["a", "b", "c", "w"].map(|node| self.dir.join(node).join("log/agent.log")));
        for log in logs {
            let Ok(content) = std::fs::read_to_string(&log) else { continue };
            let lines: Vec<&str> = content.lines().collect();
            let tail = &lines[lines.len().saturating_sub(15)..];
            text.push_str(&format!("--- {}\n{}\n", log.display(), tail.join("\n")));
        }
        text
    }

    pub(crate) fn up(&self) -> String {
        self.run(&["up", "--detach"])
    }

    /// What psql prints for a statement, or why it failed.
    pub(crate) fn sql(&self, statement: &str) -> Result<String, String> {
        let output = self.output(&["psql", "--", "--no-psqlrc", "-qAt", "-c", statement]);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    pub(crate) fn status(&self) -> Result<Value, String> {
        let output = self.output(&["status", "--json"]);
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())
    }

    pub(crate) fn primary(&self) -> Result<String, String> {
        let status = self.status()?;
        let cluster = &status["clusters"][0];
        match (cluster["primary"].as_str(), cluster["gate"].as_str()) {
            (Some(primary), Some("open")) => Ok(primary.to_owned()),
            _ => Err(cluster.to_string()),
        }
    }

    /// Waits until a primary is open and every other data node streams and counts.
    #[track_caller]
    pub(crate) fn wait_whole(&self) -> Value {
        wait_for("every standby to stream and count", || {
            let status = self.status()?;
            let cluster = &status["clusters"][0];
            let members = cluster["members"].as_array().ok_or("no members")?;
            let data = members.iter().filter(|member| !member["port"].is_null());
            let (data, voters) =
                (data.count(), cluster["durability"]["voters"].as_array().map_or(0, Vec::len));
            let settled = members.iter().all(|member| {
                matches!(member["state"].as_str(), Some("running" | "streaming"))
                    || member["role"] == "witness"
            });
            if cluster["gate"] == "open" && settled && voters + 1 == data {
                Ok(status)
            } else {
                Err(status.to_string())
            }
        })
    }

    pub(crate) fn postmaster(&self, node: &str) -> Result<i32, String> {
        let file = self.dir.join(node).join("data/postmaster.pid");
        let text = std::fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))?;
        text.lines().next().and_then(|line| line.trim().parse().ok()).ok_or(text)
    }

    pub(crate) fn agent(&self, node: &str) -> Result<i32, String> {
        let node_dir = self.dir.join(node);
        let found = self
            .processes()
            .into_iter()
            .find(|process| process.command == "agent" && process.cwd == node_dir);
        found.map(|process| process.pid).ok_or_else(|| format!("no agent of {node} runs"))
    }

    pub(crate) fn proxy(&self) -> Result<i32, String> {
        let found = self.processes().into_iter().find(|process| process.command == "proxy");
        found.map(|process| process.pid).ok_or("no proxy runs".to_owned())
    }

    /// One that has been taken over is there as long as its clients.
    pub(crate) fn proxies(&self) -> Vec<i32> {
        let found = self.processes().into_iter().filter(|process| process.command == "proxy");
        found.map(|process| process.pid).collect()
    }

    pub(crate) fn supervisor(&self) -> Result<i32, String> {
        let found = self.processes().into_iter().find(|process| process.command == "up");
        found.map(|process| process.pid).ok_or("no supervisor runs".to_owned())
    }

    /// Kills the supervisor, and waits until it is gone.
    #[track_caller]
    pub(crate) fn lose_supervisor(&self) {
        kill(self.supervisor().unwrap(), Signal::KILL).unwrap();
        wait_for("the supervisor to be gone", || match self.supervisor() {
            Err(_) => Ok(()),
            Ok(pid) => Err(pid.to_string()),
        });
    }

    /// Every process whose program or directory lies in the test's directory.
    pub(crate) fn processes(&self) -> Vec<Process> {
        let ours = |process: &Process| {
            process.exe.starts_with(self.base.path()) || process.cwd.starts_with(self.base.path())
        };
        Process::all().into_iter().filter(ours).collect()
    }

    /// A power cut for all of its hosts at once.
    #[track_caller]
    pub(crate) fn kill_everything(&self) {
        wait_for("every process to be killed", || {
            let mut left = self.processes();
            left.sort_by_key(|process| process.command != "up");
            left.iter().for_each(|process| drop(kill(process.pid, Signal::KILL)));
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        });
    }

    /// Waits until nothing runs any more. A fence takes a moment to see that nobody needs it.
    #[track_caller]
    pub(crate) fn wait_gone(&self) {
        wait_for("every process to end", || {
            let left = self.processes();
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        });
    }
}

impl Drop for Herd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        // The supervisor first, or it starts again what is killed here.
        while Instant::now() < deadline {
            let mut left = self.processes();
            left.sort_by_key(|process| process.command != "up");
            if left.is_empty() {
                return;
            }
            left.iter().for_each(|process| drop(kill(process.pid, Signal::KILL)));
            // sleep: a process that was forked during this round is found by the next
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    pub(crate) exe: PathBuf,
    pub(crate) cwd: PathBuf,
    /// The first argument, by which processes of pgherd tell what they are.
    pub(crate) command: String,
}

impl Process {
    fn all() -> Vec<Process> {
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        pids.filter_map(Process::look).collect()
    }

    fn look(pid: i32) -> Option<Process> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let exe = std::fs::read_link(proc.join("exe")).ok()?;
        let cwd = std::fs::read_link(proc.join("cwd")).ok()?;
        let arguments = std::fs::read(proc.join("cmdline")).ok()?;
        let command = arguments.split(|byte| *byte == 0).nth(1).unwrap_or_default();
        Some(Process { pid, exe, cwd, command: String::from_utf8_lossy(command).into_owned() })
    }
}

/// Fails where there is no such process: a fault that was not injected proves nothing.
pub(crate) fn kill(pid: i32, signal: Signal) -> Result<(), String> {
    let pid = Pid::from_raw(pid).ok_or("not a process number")?;
    let held = pidfd_open(pid, PidfdFlags::empty()).map_err(|error| error.to_string())?;
    pidfd_send_signal(&held, signal).map_err(|error| error.to_string())
}

/// The number of a path's owner.
pub(crate) fn owner(path: &Path) -> u32 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).unwrap().uid()
}

//! Programs: on this machine for the kit itself, and on a host of a network for what is tested.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use crate::net::Host;
use crate::process::Process;

/// Runs a tool that the kit itself needs, and fails with its words if it fails.
#[track_caller]
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    run_with_input(program, arguments, "")
}

#[track_caller]
pub(crate) fn run_with_input(program: &str, arguments: &[&str], input: &str) -> String {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {program} (a package to install?): {error}"));
    let written = child.stdin.take().expect("stdin is a pipe").write_all(input.as_bytes());
    let output = child.wait_with_output().expect("a started child can be waited for");
    if let Err(error) = written {
        panic!("{program} did not read its input: {error}; {}", words(&output));
    }
    succeeded(&format!("{program} {}", arguments.join(" ")), &output)
}

#[track_caller]
fn succeeded(what: &str, output: &Output) -> String {
    assert!(output.status.success(), "{what} failed: {}", words(output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What a program said, for a failure message.
fn words(output: &Output) -> String {
    let out = String::from_utf8_lossy(&output.stdout);
    let err = String::from_utf8_lossy(&output.stderr);
    format!("{}\n--- stdout\n{}\n--- stderr\n{}", output.status, out.trim(), err.trim())
}

/// The ids of user `postgres`, who owns every PostgreSQL here; PostgreSQL refuses to run as root.
pub fn postgres_user() -> (u32, u32) {
    static IDS: OnceLock<(u32, u32)> = OnceLock::new();
    *IDS.get_or_init(|| {
        let id = |flag| run("id", &[flag, "postgres"]).trim().parse().expect("id prints a number");
        (id("-u"), id("-g"))
    })
}

/// Gives a path to user `postgres`.
pub fn give_to_postgres(path: &Path) {
    let (uid, gid) = postgres_user();
    std::os::unix::fs::chown(path, Some(uid), Some(gid))
        .unwrap_or_else(|error| panic!("cannot give {} to postgres: {error}", path.display()));
}

/// Longer than any program takes here that is not stuck.
const DEFAULT_DEADLINE: Duration = Duration::from_secs(120);

/// A program to be started on a host. Not [`Command`] itself: its `spawn` would start it on the wrong host.
#[derive(Debug)]
pub struct HostCommand {
    command: Command,
    host: Host,
    input: Option<String>,
    deadline: Duration,
}

/// Why a program that was waited for has no result: it was ended because its time was up.
#[derive(Debug)]
pub struct Overdue {
    text: String,
    deadline: Duration,
}

impl std::fmt::Display for Overdue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} had not ended after {:.1} s", self.text, self.deadline.as_secs_f64())
    }
}

impl HostCommand {
    pub(crate) fn new(host: &Host, program: &OsStr) -> HostCommand {
        let mut command = Command::new(program);
        // The directory of the test may be one that postgres cannot enter.
        command.current_dir(host.dir()).stdin(Stdio::null());
        HostCommand { command, host: host.clone(), input: None, deadline: DEFAULT_DEADLINE }
    }

    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> HostCommand {
        self.command.arg(argument);
        self
    }

    pub fn args(mut self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> HostCommand {
        self.command.args(arguments);
        self
    }

    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> HostCommand {
        self.command.env(name, value);
        self
    }

    /// As user postgres, without root's groups and with a home of its own.
    pub fn as_postgres(mut self) -> HostCommand {
        let (uid, gid) = postgres_user();
        self.command.uid(uid).gid(gid).env("HOME", self.host.dir()).env("USER", "postgres");
        self
    }

    /// What the program reads from its standard input; nothing by default.
    pub fn input(mut self, text: &str) -> HostCommand {
        self.input = Some(text.to_owned());
        self
    }

    /// How long it may take when it is waited for; two minutes by default.
    pub fn within(mut self, deadline: Duration) -> HostCommand {
        self.deadline = deadline;
        self
    }

    /// Appends stdout and stderr to a file, for a program that goes on in the background.
    pub fn log_to(mut self, path: &Path) -> HostCommand {
        let open = || {
            std::fs::File::options()
                .create(true)
                .append(true)
                .open(path)
                .unwrap_or_else(|error| panic!("cannot open {}: {error}", path.display()))
        };
        self.command.stdout(open()).stderr(open());
        self
    }

    /// Starts it in the background, in a process group of its own: a Ctrl-C for the tests does not reach it.
    #[track_caller]
    pub fn spawn(mut self) -> Process {
        assert!(self.input.is_none(), "input is for programs that are waited for");
        self.command.process_group(0);
        let mut child = self.start();
        // As long as nobody has waited for it, its number is not given to another process.
        let process = Process::of_child(&child);
        std::thread::spawn(move || child.wait());
        process
    }

    #[track_caller]
    fn start(&mut self) -> Child {
        let started = self.host.enter(|| self.command.spawn());
        started
            .unwrap_or_else(|error| panic!("cannot start {} on {}: {error}", self.text(), self.host.name()))
    }

    /// Runs it to its end, whatever the end is; one that takes too long fails the test.
    #[track_caller]
    pub fn output(self) -> Output {
        match self.try_output() {
            Ok(output) => output,
            Err(overdue) => panic!("{overdue}"),
        }
    }

    /// As [`HostCommand::output`], for a program that a fault may hold up.
    pub fn try_output(mut self) -> Result<Output, Overdue> {
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        if self.input.is_some() {
            self.command.stdin(Stdio::piped());
        }
        let mut child = self.start();
        let process = Process::of_child(&child);
        if let Some(input) = &self.input {
            let mut pipe = child.stdin.take().expect("stdin is a pipe");
            // A program that ends without reading says why itself.
            let _unread = pipe.write_all(input.as_bytes());
        }
        let (done, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            // Nobody listens any more when the time was up.
            let _too_late = done.send(child.wait_with_output());
        });
        match ended.recv_timeout(self.deadline) {
            Ok(output) => Ok(output.expect("a started child can be waited for")),
            Err(_) => {
                process.signal(rustix::process::Signal::KILL);
                let text = format!("{} on {}", self.text(), self.host.name());
                Err(Overdue { text, deadline: self.deadline })
            }
        }
    }

    /// Runs it, fails the test if it fails, and returns what it printed on stdout.
    #[track_caller]
    pub fn run(self) -> String {
        let text = format!("{} on {}", self.text(), self.host.name());
        succeeded(&text, &self.output())
    }

    fn text(&self) -> String {
        let words: Vec<OsString> = [self.command.get_program()]
            .into_iter()
            .chain(self.command.get_args())
            .map(OsStr::to_owned)
            .collect();
        words.join(OsStr::new(" ")).to_string_lossy().into_owned()
    }
}

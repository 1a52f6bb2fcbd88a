//! Running pgherd with nothing of this machine's environment in it.

use std::path::Path;
use std::process::{Command, Output, Stdio};

/// The program that was built for this test.
pub(crate) const PGHERD: &str = env!("CARGO_BIN_EXE_pgherd");

/// pgherd with these arguments, started in `dir`, which is also its home. No colours, no settings, nobody to
/// answer questions.
pub(crate) fn pgherd(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(PGHERD);
    command.args(arguments).current_dir(dir).stdin(Stdio::null()).env_clear();
    command.env("PATH", "/usr/bin:/bin").env("HOME", dir).env("PGHERD_DIR", dir.join("herd"));
    command
}

pub(crate) fn output(dir: &Path, arguments: &[&str]) -> Output {
    pgherd(dir, arguments).output().expect("the program was built")
}

/// A command with what it printed and how it ended, as a person would see it; the directory is told as `DIR`.
pub(crate) fn transcript(dir: &Path, arguments: &[&str]) -> String {
    let output = output(dir, arguments);
    let mut text = format!("$ pgherd {}\n", arguments.join(" "));
    text.push_str(&String::from_utf8_lossy(&output.stdout));
    for line in String::from_utf8_lossy(&output.stderr).lines() {
        text.push_str(&format!("2| {line}\n"));
    }
    if let Some(code) = output.status.code().filter(|code| *code != 0) {
        text.push_str(&format!("exit code {code}\n"));
    }
    text.replace(&dir.display().to_string(), "DIR")
}

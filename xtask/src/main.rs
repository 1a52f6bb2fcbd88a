//! The project's own chores: `cargo xtask verify`, `fix` and `tidy`.
//!
//! `verify` never writes, and is what every push must pass besides the tests. `fix` writes what `verify`
//! would refuse and a program can put right. `tidy` is the part of `verify` that no other tool knows: the
//! rules of this project, each printed with its reason.

#![expect(clippy::print_stderr, reason = "a command line speaks to whoever typed it")]

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

mod tidy;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let root = root();
    let done = match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["verify"] => verify(&root),
        ["fix"] => fix(&root),
        ["tidy"] => run_tidy(&root),
        _ => {
            eprintln!("usage: cargo xtask verify|fix|tidy");
            return ExitCode::from(2);
        }
    };
    if done { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().expect("xtask lies in the root of the workspace").to_owned()
}

/// All checks, also after one has failed: who puts things right wants to know everything.
fn verify(root: &Path) -> bool {
    let clippy = ["clippy", "--locked", "--workspace", "--all-targets", "-q", "--", "-D", "warnings"];
    let checks = [
        run(root, &["fmt", "--all", "--check"], &[]),
        run(root, &clippy, &[]),
        run(
            root,
            &["doc", "--locked", "--workspace", "--no-deps", "--document-private-items", "-q"],
            // Private modules are documented for readers of the code, so links to private items are right.
            &[("RUSTDOCFLAGS", "-D warnings -A rustdoc::private-intra-doc-links")],
        ),
        run_tidy(root),
    ];
    checks.into_iter().all(|passed| passed)
}

fn fix(root: &Path) -> bool {
    let fixes = [
        run(root, &["fmt", "--all"], &[]),
        // Pages and recorded outputs that come from the program.
        run(
            root,
            &["test", "--locked", "-q", "-p", "pgherd-agent", "--test", "files", "golden"],
            &[("PGHERD_UPDATE_GOLDEN", "1")],
        ),
    ];
    fixes.into_iter().all(|passed| passed)
}

fn run(root: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> bool {
    eprintln!("cargo {}", arguments.join(" "));
    let status =
        Command::new(cargo()).args(arguments).envs(environment.iter().copied()).current_dir(root).status();
    match status {
        Ok(status) => status.success(),
        Err(error) => {
            eprintln!("failed to start cargo: {error}");
            false
        }
    }
}

/// The cargo that runs this program, else the one on the path.
fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned())
}

fn run_tidy(root: &Path) -> bool {
    eprintln!("tidy");
    let complaints = tidy::check(root);
    for complaint in &complaints {
        eprintln!("{complaint}");
    }
    if complaints.is_empty() {
        return true;
    }
    eprintln!("tidy: {} complaints", complaints.len());
    false
}

//! The program `pgherd`: reads the command line, calls what it names, prints what came of it.
//!
//! Responsible for: presentation. Data goes to stdout, everything else to stderr; the exit code says how it
//! ended. Leaves out: every decision about a herd. Those are made by agents; this program asks them.
//!
//! Hazard: an option that is taken and has no effect, or a success that was none. So an option that means
//! nothing to a command is refused, and every failure goes through [`failure`].

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "stdout and stderr are this crate's business")]

mod args;
mod commands;
mod connect;
mod failure;
mod output;

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What `check` exits with when it cannot know.
const UNKNOWN: u8 = 3;

fn main() -> ExitCode {
    let line = match args::parse(std::env::args_os()) {
        Ok(line) => line,
        Err(error) if error.use_stderr() && std::env::args_os().any(|argument| argument == "check") => {
            // To monitoring, the usual exit code of a mistyped line would mean that the herd is down.
            let _unread = error.print();
            return ExitCode::from(UNKNOWN);
        }
        Err(error) if error.use_stderr() && commands::wal::is_fetch(std::env::args_os()) => {
            return commands::wal::unsure(&failure::Failure::usage(error.to_string())).report(false);
        }
        Err(error) => error.exit(),
    };
    let (json, outcome) = match line {
        args::Line::Run(cli) if commands::wal::is_fetch(std::env::args_os()) => (false, fetch(cli)),
        args::Line::Run(cli) => (cli.global.json, commands::run(cli)),
        args::Line::NotBuilt(name) => (false, Err(failure::Failure::not_built(&format!("pgherd {name}")))),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(json),
    }
}

/// Whatever goes wrong, PostgreSQL must not take it for the end of the WAL: not even a panic, whose exit code would be one of those.
fn fetch(cli: args::Cli) -> Result<(), failure::Failure> {
    match std::panic::catch_unwind(|| commands::run(cli)) {
        // The exit code of one that is told is that of an absent file.
        Ok(Err(failure @ failure::Failure::Told(_))) => Err(commands::wal::unsure(&failure)),
        Ok(outcome) => outcome,
        Err(_) => Err(commands::wal::unsure(&failure::Failure::failed("the program has a fault"))),
    }
}

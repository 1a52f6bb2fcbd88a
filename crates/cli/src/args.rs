//! The command line: global options, the commands, and which option means something to which command.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgAction, Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::commands;
use crate::failure::Failure;

#[derive(Debug, Parser)]
#[command(
    name = "pgherd",
    version,
    about = "A herd of PostgreSQL servers that fails over by itself and loses nothing",
    after_help = after_help(),
    arg_required_else_help = true,
    max_term_width = 100
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Herd file to read
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) herd: Option<PathBuf>,
    /// Directory of the herd or agent on this host [default: $PGHERD_DIR, else /var/lib/pgherd as root, else
    /// ~/.pgherd]
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Agent to ask, as https://host:port, with the certificate of client.toml in the directory
    #[arg(long, global = true, value_name = "URL")]
    pub(crate) url: Option<String>,
    /// Cluster that is meant, needed only where the herd has several
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) cluster: Option<String>,
    /// Print JSON for programs
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Say more on stderr about what is done; twice: everything
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub(crate) verbose: u8,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Up(commands::up::UpArgs),
    Down(commands::down::DownArgs),
    Init(commands::init::InitArgs),
    Token(commands::token::TokenArgs),
    Agent(commands::agent::AgentArgs),
    Operator(commands::operator::OperatorArgs),
    Proxy(commands::proxy::ProxyArgs),
    #[command(hide = true)]
    Fence(commands::fence::FenceArgs),
    Validate(commands::validate::ValidateArgs),
    Plan(commands::plan::PlanArgs),
    Apply(commands::apply::ApplyArgs),
    Status(commands::status::StatusArgs),
    Check(commands::check::CheckArgs),
    Switchover(commands::switchover::SwitchoverArgs),
    Failover(commands::failover::FailoverArgs),
    History(commands::history::HistoryArgs),
    Explain(commands::explain::ExplainArgs),
    Logs(commands::logs::LogsArgs),
    Psql(commands::psql::PsqlArgs),
    Backup(commands::backup::BackupArgs),
    Restore(Box<commands::restore::RestoreArgs>),
    Wal(commands::wal::WalArgs),
    Import(commands::import::ImportArgs),
    Completions(commands::completions::CompletionsArgs),
    Man(commands::man::ManArgs),
}

/// Commands that the design names and this version does not have. They are refused by name, so that nobody
/// takes silence for success.
pub(crate) const NOT_BUILT: [&str; 11] =
    ["restart", "reload", "reinit", "pause", "resume", "secret", "store", "doctor", "drill", "top", "adopt"];

fn after_help() -> String {
    format!(
        "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused by a safety rule, 4 timed out. `check` has its \
         own: 0 ok, 1 warning, 2 critical, 3 unknown.\n\nNot built yet, and refused: {}.",
        NOT_BUILT.join(", ")
    )
}

/// What a command makes of the global options: those that it takes.
const TAKES: &[(&str, &[&str])] = &[
    ("up", &["herd", "dir"]),
    ("down", &["dir"]),
    ("init", &["herd", "dir"]),
    ("token", &["dir", "url", "json"]),
    ("agent", &["dir"]),
    ("operator", &["dir", "url"]),
    ("proxy", &["dir", "url", "cluster"]),
    ("fence", &[]),
    ("validate", &["herd", "dir", "json"]),
    ("plan", &["herd", "dir", "url", "json"]),
    ("apply", &["herd", "dir", "url", "json"]),
    ("status", &["dir", "url", "cluster", "json"]),
    ("check", &["dir", "url", "cluster", "json"]),
    ("switchover", &["dir", "url", "cluster", "json"]),
    ("failover", &["dir", "url", "cluster", "json"]),
    ("history", &["dir", "url", "cluster", "json"]),
    ("explain", &["dir", "url", "cluster", "json"]),
    ("logs", &["dir", "url", "json"]),
    ("psql", &["dir", "url", "cluster"]),
    ("backup", &["dir", "url", "cluster", "json"]),
    ("restore", &["dir", "url", "cluster", "json"]),
    ("wal", &["json"]),
    ("import", &["json"]),
    ("completions", &[]),
    ("man", &[]),
];

/// Global options besides `--verbose`, which every command takes.
const GLOBALS: [&str; 5] = ["herd", "dir", "url", "cluster", "json"];

fn takes(command: &str) -> &'static [&'static str] {
    TAKES.iter().find(|(name, _)| *name == command).map_or(&[], |(_, takes)| takes)
}

/// What a command line asks for.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one in the life of the program")]
pub(crate) enum Line {
    Run(Cli),
    NotBuilt(String),
}

/// The commands that there are, without, in the help of each, the options that mean nothing to it.
pub(crate) fn what_there_is() -> clap::Command {
    let mut command = Cli::command();
    let globals: Vec<clap::Arg> =
        command.get_arguments().filter(|arg| GLOBALS.contains(&arg.get_id().as_str())).cloned().collect();
    for (name, takes) in TAKES {
        let hidden = globals.iter().filter(|global| !takes.contains(&global.get_id().as_str()));
        let hidden: Vec<clap::Arg> = hidden.map(|global| global.clone().hide(true)).collect();
        command = command.mut_subcommand(name, |sub| with_all(sub, &hidden));
    }
    command
}

/// A command that has an argument of that name already is not given the global one.
fn with_all(mut command: clap::Command, arguments: &[clap::Arg]) -> clap::Command {
    let nested: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    for name in nested {
        command = command.mut_subcommand(&name, |sub| with_all(sub, arguments));
    }
    command.args(arguments)
}

/// The whole command line, with the names that are only refused.
pub(crate) fn command() -> clap::Command {
    let mut command = what_there_is();
    let anything = clap::Arg::new("anything").num_args(0..).trailing_var_arg(true).allow_hyphen_values(true);
    for name in NOT_BUILT {
        let refused = clap::Command::new(name).hide(true).disable_help_flag(true).arg(anything.clone());
        command = command.subcommand(refused);
    }
    command
}

pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Line, clap::Error> {
    let mut command = command();
    let matches = command.try_get_matches_from_mut(arguments)?;
    let name = matches.subcommand_name().unwrap_or_default();
    if NOT_BUILT.contains(&name) {
        return Ok(Line::NotBuilt(name.to_owned()));
    }
    let cli = Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command))?;
    cli.global.refuse_what_means_nothing_to(name).map_err(|text| {
        clap::Error::raw(clap::error::ErrorKind::ArgumentConflict, text).with_cmd(&command)
    })?;
    Ok(Line::Run(cli))
}

impl Global {
    fn refuse_what_means_nothing_to(&self, command: &str) -> Result<(), String> {
        let given = [
            ("herd", self.herd.is_some()),
            ("dir", self.dir.is_some()),
            ("url", self.url.is_some()),
            ("cluster", self.cluster.is_some()),
            ("json", self.json),
        ];
        let taken = takes(command);
        match given.into_iter().find(|(name, given)| *given && !taken.contains(name)) {
            Some((name, _)) => Err(format!("--{name} means nothing to pgherd {command}\n")),
            None => Ok(()),
        }
    }

    /// `--dir`, else `$PGHERD_DIR`, else where this user's herd lives.
    pub(crate) fn dir(&self) -> Result<PathBuf, Failure> {
        let named = self.dir.clone().or_else(|| non_empty("PGHERD_DIR"));
        let dir = match named {
            Some(dir) => dir,
            None if rustix::process::geteuid().is_root() => PathBuf::from("/var/lib/pgherd"),
            None => non_empty("HOME").map(|home| home.join(".pgherd")).ok_or_else(|| {
                Failure::usage("no directory is named, and $HOME is not set").hint("name one with --dir")
            })?,
        };
        // Processes that are started from elsewhere must mean the same place.
        std::path::absolute(&dir).map_err(|error| Failure::io("find", &dir, &error))
    }
}

fn non_empty(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn every_command_says_which_global_options_it_takes() {
        let command = Cli::command();
        let commands: Vec<&str> = command.get_subcommands().map(clap::Command::get_name).collect();
        for name in &commands {
            assert!(TAKES.iter().any(|(known, _)| known == name), "{name} is missing in TAKES");
        }
        for (name, globals) in TAKES {
            assert!(commands.contains(name), "{name} is no command");
            assert!(globals.iter().all(|global| GLOBALS.contains(global)));
        }
        assert!(NOT_BUILT.iter().all(|name| !commands.contains(name)));
    }
}

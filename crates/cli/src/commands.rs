//! One file per command. Here: which one runs, on which runtime, and what several of them share.

pub(crate) mod agent;
pub(crate) mod apply;
pub(crate) mod backup;
pub(crate) mod check;
pub(crate) mod completions;
pub(crate) mod down;
pub(crate) mod explain;
pub(crate) mod failover;
pub(crate) mod fence;
pub(crate) mod history;
pub(crate) mod import;
pub(crate) mod init;
pub(crate) mod kept;
pub(crate) mod logs;
pub(crate) mod man;
pub(crate) mod operator;
pub(crate) mod plan;
pub(crate) mod proxy;
pub(crate) mod psql;
pub(crate) mod restore;
pub(crate) mod status;
pub(crate) mod switchover;
pub(crate) mod token;
pub(crate) mod up;
pub(crate) mod validate;
pub(crate) mod wal;

mod change;
mod herd_file;

use std::path::PathBuf;

use pgherd_api::status::{Cluster, Status};

use crate::args::{Cli, Command, Global};
use crate::failure::Failure;

pub(crate) fn run(cli: Cli) -> Result<(), Failure> {
    let Cli { global, command } = cli;
    match command {
        // The fence has no runtime: it must work when everything around it is starved.
        Command::Fence(args) => fence::run(args),
        Command::Agent(args) => agent::run(args, &global),
        Command::Up(args) => up::run(args, &global),
        Command::Down(args) => down::run(args, &global),
        Command::Init(args) => block_on(&global, init::run(args, &global)),
        Command::Token(args) => block_on(&global, token::run(args, &global)),
        Command::Operator(args) => block_on(&global, operator::run(args, &global)),
        Command::Proxy(args) => proxy::run(args, &global),
        Command::Validate(args) => validate::run(args, &global),
        Command::Plan(args) => block_on(&global, plan::run(args, &global)),
        Command::Apply(args) => block_on(&global, apply::run(args, &global)),
        Command::Status(args) => block_on(&global, status::run(args, &global)),
        Command::Check(args) => block_on(&global, check::run(args, &global)),
        Command::Switchover(args) => block_on(&global, switchover::run(args, &global)),
        Command::Failover(args) => block_on(&global, failover::run(args, &global)),
        Command::History(args) => block_on(&global, history::run(args, &global)),
        Command::Explain(args) => block_on(&global, explain::run(args, &global)),
        Command::Logs(args) => block_on(&global, logs::run(args, &global)),
        Command::Psql(args) => block_on(&global, psql::run(args, &global)),
        Command::Backup(args) => block_on_threads(&global, backup::run(args, &global)),
        Command::Restore(args) => block_on_threads(&global, restore::run(*args, &global)),
        Command::Wal(args) => block_on(&global, wal::run(args, &global)),
        Command::Import(args) => import::run(&args, &global),
        Command::Completions(args) => completions::run(&args),
        Command::Man(args) => man::run(&args),
    }
}

/// Runs a command that asks agents, or any other that needs no second thread.
fn block_on(global: &Global, work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    crate::output::trace_to_stderr(global.verbose);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| Failure::failed("cannot start a runtime").because(error))?.block_on(work)
}

/// Runs a command that compresses, encrypts and hashes beside what comes and goes.
fn block_on_threads(global: &Global, work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    crate::output::trace_to_stderr(global.verbose);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::failed("cannot start a runtime").because(error))?;
    // It ends with the process: threads of work that was given up would panic if it were shut down under them, and what they leave is what
    // a kill leaves.
    std::mem::ManuallyDrop::new(runtime).block_on(work)
}

/// The cluster that is meant: the named one, or the only one.
fn cluster<'a>(status: &'a Status, named: Option<&str>) -> Result<&'a Cluster, Failure> {
    let names = || status.clusters.iter().map(|cluster| cluster.name.as_str()).collect::<Vec<_>>().join(", ");
    match (named, status.clusters.as_slice()) {
        (Some(named), clusters) => clusters.iter().find(|cluster| cluster.name == named).ok_or_else(|| {
            Failure::usage(format!("the herd has no cluster \"{named}\""))
                .hint(format!("it has: {}", names()))
        }),
        (None, [only]) => Ok(only),
        (None, []) => Err(Failure::failed("the herd has no cluster")),
        (None, _) => Err(Failure::usage("the herd has several clusters")
            .hint(format!("name one with --cluster: {}", names()))),
    }
}

/// Refuses a node that the cluster does not have.
fn known_node(cluster: &Cluster, node: &str) -> Result<(), Failure> {
    if cluster.members.iter().any(|member| member.name == node) {
        return Ok(());
    }
    let names: Vec<&str> = cluster.members.iter().map(|member| member.name.as_str()).collect();
    Err(Failure::usage(format!("cluster {} has no node \"{node}\"", cluster.name))
        .hint(format!("it has: {}", names.join(", "))))
}

/// The repository's file that is named, else that of a herd on this host: each of its agents keeps one, in a directory of its own or below that of `up`.
fn repository_file(global: &Global, named: Option<PathBuf>) -> Result<PathBuf, Failure> {
    if let Some(named) = named {
        return Ok(named);
    }
    let dir = global.dir()?;
    let below = std::fs::read_dir(&dir).into_iter().flatten().flatten().map(|node| node.path());
    let files = below.chain([dir.clone()]).map(|place| place.join(pgherd_agent::paths::REPOSITORY_FILE));
    files.filter(|file| file.is_file()).min().ok_or_else(|| {
        Failure::usage(format!("no repository is named, and {} has no herd with one", dir.display()))
            .hint("--repository FILE names one, and --dir DIR a herd whose file has [backup]")
    })
}

/// As libpq has it, for a server that no herd knows.
fn password_from_environment() -> Option<String> {
    std::env::var("PGPASSWORD").ok().filter(|text| !text.is_empty())
}

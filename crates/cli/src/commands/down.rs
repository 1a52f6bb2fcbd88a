//! `pgherd down`: the planned stop of a herd on this machine, and its removal.

use std::time::Duration;

use clap::Args;
use pgherd_agent::local::{Ask, Event, Home, Lock, Options, Remains, Supervisor, attach, remains};
use tokio::time::Instant;

use super::up::View;
use crate::args::Global;
use crate::failure::Failure;
use crate::output::confirm::confirm;
use crate::output::note;
use crate::output::numbers::{bytes, counted};

/// From the last event to the end of the process that had the lock.
const LOCK_WITHIN: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Stop the herd on this machine
///
/// First the primary, once the standbys have its last WAL, then the standbys, then the agents. `pgherd up`
/// goes on where it stopped.
#[derive(Debug, Args)]
pub(crate) struct DownArgs {
    /// Remove the herd and all its data afterwards
    #[arg(long)]
    delete: bool,
    /// Do not ask
    #[arg(long, requires = "delete")]
    yes: bool,
}

pub(crate) fn run(args: DownArgs, global: &Global) -> Result<(), Failure> {
    crate::output::trace_to_stderr(global.verbose);
    let home = Home::at(global.dir()?);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| Failure::failed("cannot start a runtime").because(error))?;
    if !home.has_herd() {
        note(&format!("there is no herd in {}", home.dir().display()));
        return Ok(());
    }
    if args.delete
        && let Some(found) = remains(&home)?
    {
        ask(&home, &found, args.yes)?;
    }
    runtime.block_on(async {
        stop(&home).await?;
        if args.delete { delete(&home).await } else { Ok(()) }
    })
}

fn ask(home: &Home, found: &Remains, yes: bool) -> Result<(), Failure> {
    let what = format!(
        "stops the herd in {} and removes it: {} with their data{}, {} in all. This cannot be taken back",
        home.dir().display(),
        counted(found.nodes.len(), "node", "nodes"),
        if found.backups { " and all their backups" } else { "" },
        bytes(found.bytes)
    );
    confirm(&what, "Remove it?", yes)
}

/// Through its supervisor, or in its place where there is none.
async fn stop(home: &Home) -> Result<(), Failure> {
    match Lock::take(home)? {
        Some(lock) => {
            let options = Options {
                dir: home.dir().to_owned(),
                herd_file: None,
                program: std::env::current_exe().map_err(|error| {
                    Failure::failed("cannot find the program that this is").because(error)
                })?,
            };
            let supervisor = Supervisor::new(lock, options);
            let mut events = supervisor.board().watch();
            let telling = tokio::spawn(async move {
                let mut view = View::new(Home::at("."), "");
                while let Some(event) = events.next().await {
                    view.show(&event);
                }
            });
            let outcome = supervisor.stop().await;
            // Its board is gone by now, and so the telling ends.
            let _told = telling.await;
            outcome.map_err(Failure::from)
        }
        None => {
            let mut attachment = attach(home, Ask::Stop).await?;
            let mut view = View::new(home.clone(), "");
            let mut stopping = false;
            while let Some(event) = attachment.next().await {
                // What went before the stop is no news here.
                stopping |= event == Event::Stopping;
                match event {
                    Event::Stopped => {
                        view.show(&event);
                        return Ok(());
                    }
                    Event::Failed { message, hint } => {
                        view.end();
                        return Err(hint.into_iter().fold(Failure::failed(message), Failure::hint));
                    }
                    event if stopping => view.show(&event),
                    _ => {}
                }
            }
            view.end();
            Err(Failure::failed("the supervisor ended before the herd was stopped")
                .hint("pgherd down again stops what still runs"))
        }
    }
}

async fn delete(home: &Home) -> Result<(), Failure> {
    let deadline = Instant::now() + LOCK_WITHIN;
    let lock = loop {
        match Lock::take(home)? {
            Some(lock) => break lock,
            None if Instant::now() > deadline => {
                return Err(Failure::failed("another pgherd up has begun here; nothing was removed"));
            }
            None => tokio::time::sleep(LOOK_EVERY).await,
        }
    };
    // Looked at again: it may have changed while the herd stopped.
    if let Some(found) = remains(home)? {
        found.remove(lock)?;
    }
    note(&format!("removed {}", home.dir().display()));
    Ok(())
}

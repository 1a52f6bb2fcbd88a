//! What commands do.
//!
//! Nothing here is a reason for a failover, and nothing holds up a switchover: what is paused lends no server, and a primary
//! is drained when nobody has one. Hazard: PAUSE and KILL hold every client of a database until somebody says RESUME.

use std::sync::Arc;
use std::time::Duration;

use super::command::{Command, HELP, Refused};
use super::pgpool;
use super::shown;
use super::table::{Table, Value};
use super::{DATABASES, Reply};
use crate::nodes;
use crate::pool::ClientId;
use crate::timer::{sleep, timeout};
use crate::wish::{Promote, Unwilling};
use crate::world::World;

/// How often it is looked whether something is over that a command waits for.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// A checkpoint of a busy server comes first and can take minutes.
const PROMOTED_WITHIN: Duration = Duration::from_secs(300);

fn refused(code: &[u8; 5], message: String, hint: &str) -> Refused {
    Refused::new(code, message).hint(hint)
}

/// A database that is not the console.
fn database(name: &str) -> Result<(), Refused> {
    match DATABASES.contains(&name) {
        true => Err(Refused::new(b"0A000", format!("\"{name}\" is the console itself"))
            .hint("Name a database of PostgreSQL.")),
        false => Ok(()),
    }
}

fn databases(name: Option<&String>) -> Result<(), Refused> {
    name.map_or(Ok(()), |name| database(name))
}

/// Performs one command. What waits for servers lasts as long as their clients have them.
pub(super) async fn perform(command: &Command, by: &str, world: &Arc<World>) -> Result<Reply, Refused> {
    if command.acts() {
        tracing::info!(by, ?command, "a command of the console");
    }
    match command {
        Command::Show(show) => {
            return Ok(match shown::table(*show, &world.see()) {
                Some(table) => table.into(),
                None => {
                    Reply { table: None, notice: Some(("Console usage".to_owned(), Some(HELP.to_owned()))) }
                }
            });
        }
        Command::ShowSetting(name, value) => {
            let rows = vec![vec![Value::from(*value)]];
            return Ok(Table { columns: shown::setting_column(name), rows }.into());
        }
        Command::SelectOne => {
            return Ok(Table { columns: &shown::ONE, rows: vec![vec![Value::Number(1)]] }.into());
        }
        Command::Set => return Ok(Reply::noticing("SET has no effect here")),
        Command::Begin | Command::Commit | Command::Rollback => {}
        Command::Pause(name) => {
            databases(name.as_ref())?;
            pause(name.as_deref(), world)?;
            wait(|| world.pools.have_none(name.as_deref())).await;
        }
        Command::Kill(name) => {
            databases(name.as_ref())?;
            kill(name.as_deref(), world)?;
        }
        Command::Resume(name) => {
            databases(name.as_ref())?;
            resume(name.as_deref(), world)?;
        }
        Command::Reconnect(name) => {
            databases(name.as_ref())?;
            world.pools.reconnect(name.as_deref(), world);
        }
        Command::WaitClose(name) => {
            databases(name.as_ref())?;
            wait(|| world.pools.are_fresh(name.as_deref())).await;
        }
        // One that is being told so is there for a moment longer.
        Command::KillClient(id) => match world.roster.find(ClientId(*id)).filter(|card| !card.is_dismissed())
        {
            Some(card) => card.dismiss(),
            None => {
                return Err(refused(
                    b"42704",
                    format!("there is no client {id}"),
                    "SHOW CLIENTS lists them, in the column id.",
                ));
            }
        },
        Command::Disable(name) => {
            database(name)?;
            world.disabled().insert(name.clone());
        }
        Command::Enable(name) => {
            world.disabled().remove(name);
        }
        Command::Reload => match world.reloads.ask(()).await {
            Some(Ok(())) => {
                return Ok(Reply::noticing(
                    "what the herd wants, and the certificates, are taken over; the herd file is by pgherd apply",
                ));
            }
            // PostgreSQL's code for a configuration file that has an error.
            Some(Err(why)) => {
                return Err(refused(
                    b"F0000",
                    format!("not everything was taken over: {why}"),
                    "What was in force before still is. Put it right and say RELOAD again.",
                ));
            }
            None => {
                return Ok(Reply::noticing(
                    "the proxy is told to look for what has changed; its log says what came of it",
                ));
            }
        },
        // Whoever runs the proxy does it, and follows the herd meanwhile.
        Command::Shutdown(ending) => {
            world.ending.send_replace(Some(*ending));
        }
        Command::Detach(text) => return detach(text, world),
        Command::Promote(text) => return promote(text, by, world).await,
        Command::Attach(text) => {
            let (name, _) = find(text, world)?;
            world.fence.detached().remove(&name);
        }
    }
    Ok(Reply::default())
}

/// Its client has asked for that while it waited. A pause that nobody has yet is taken back, as PgBouncer does.
pub(super) fn cancel(command: &Command, by: &str, world: &Arc<World>) -> Refused {
    let hint = match command {
        Command::Pause(name) => {
            tracing::info!(by, ?command, "was canceled, and is taken back");
            world.pools.set_paused(world, |paused| match name {
                Some(name) => drop(paused.databases.remove(name)),
                None => paused.all = false,
            });
            "What it has paused goes on."
        }
        Command::WaitClose(_) => "Servers are replaced nevertheless, each when it is given back.",
        Command::Reload => "What has changed is taken over nevertheless.",
        Command::Promote(_) => {
            "The herd goes on with it: pgherd status. Until it hands over: pgherd switchover --cancel"
        }
        _ => "What it has done stays done.",
    };
    // In PostgreSQL's words.
    refused(b"57014", "canceling statement due to user request".to_owned(), hint)
}

async fn wait(over: impl Fn() -> bool) {
    while !over() {
        sleep(LOOK_EVERY).await;
    }
}

fn pause(name: Option<&str>, world: &Arc<World>) -> Result<(), Refused> {
    let is_new = world.pools.set_paused(world, |paused| match name {
        _ if paused.all => false,
        Some(name) => paused.databases.insert(name.to_owned()),
        None => !std::mem::replace(&mut paused.all, true),
    });
    if name.is_none() {
        // Its own connection, for passwords, would be one that is left.
        world.verifiers.rest();
    }
    match is_new {
        true => Ok(()),
        false => Err(refused(b"55000", "already paused".to_owned(), "RESUME ends that.")),
    }
}

fn resume(name: Option<&str>, world: &Arc<World>) -> Result<(), Refused> {
    let outcome = world.pools.set_paused(world, |paused| match name {
        Some(name) if paused.databases.remove(name) => Ok(()),
        Some(_) if paused.all => Err("all databases are paused".to_owned()),
        Some(name) => Err(format!("database \"{name}\" is not paused")),
        None if *paused == Default::default() => Err("nothing is paused".to_owned()),
        None => {
            *paused = Default::default();
            Ok(())
        }
    });
    outcome.map_err(|message| {
        refused(
            b"55000",
            message,
            "SHOW DATABASES says what is paused; RESUME without a name resumes everything.",
        )
    })
}

/// Also walsenders, which have servers of no pool.
fn kill(name: Option<&str>, world: &Arc<World>) -> Result<(), Refused> {
    world.pools.set_paused(world, |paused| match name {
        Some(name) => drop(paused.databases.insert(name.to_owned())),
        None => paused.all = true,
    });
    for card in world.roster.cards() {
        let is_meant = name.is_none_or(|name| *card.database == *name);
        if is_meant && !DATABASES.contains(&&*card.database) {
            card.dismiss();
        }
    }
    Ok(())
}

fn find(text: &str, world: &Arc<World>) -> Result<(pgherd_core::types::NodeName, nodes::Node), Refused> {
    let seen = world.see();
    pgpool::find(&seen, text).ok_or_else(|| {
        let names: Vec<String> = seen.nodes.nodes.keys().map(ToString::to_string).collect();
        Refused::new(b"42704", format!("there is no node \"{text}\""))
            .hint(format!("The proxy has heard of: {}.", names.join(", ")))
    })
}

fn detach(text: &str, world: &Arc<World>) -> Result<Reply, Refused> {
    let (name, node) = find(text, world)?;
    if node.role == nodes::Role::Primary {
        return Err(refused(
            b"0A000",
            format!("node {name} is the primary"),
            "A proxy cannot do without it. A planned change of primary: pgherd switchover",
        ));
    }
    world.fence.detached().insert(name.clone());
    world.pools.reconnect_at(&name, world);
    Ok(Reply::noticing(format!(
        "this proxy begins nothing at {name} until ATTACH {name}, or until it is started again"
    )))
}

/// The herd does it, as a planned change of primary: clients of this proxy wait for it, like all others.
async fn promote(text: &str, by: &str, world: &Arc<World>) -> Result<Reply, Refused> {
    let (name, _) = find(text, world)?;
    let is_primary =
        || world.see().nodes.nodes.get(&name).is_some_and(|node| node.role == nodes::Role::Primary);
    if is_primary() {
        return Ok(Reply::noticing(format!("{name} is the primary already")));
    }
    let asked = world.promotions.ask(Promote { to: name.to_string(), role: by.to_owned() }).await;
    let hint = "pgherd status shows whether it is under way, pgherd history how it ended.";
    match asked {
        None => Err(refused(b"58000", format!("no agent has said whether {name} is promoted"), hint)),
        Some(Err(Unwilling { why, hint })) => {
            let refused = Refused::new(b"55000", format!("{name} is not promoted: {why}"));
            Err(hint.into_iter().fold(refused, Refused::hint))
        }
        Some(Ok(())) => match timeout(PROMOTED_WITHIN, wait(is_primary)).await {
            Ok(()) => Ok(Reply::noticing(format!("{name} is the primary"))),
            Err(_) => Err(refused(b"58000", format!("{name} is not the primary after five minutes"), hint)),
        },
    }
}

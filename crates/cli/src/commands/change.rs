//! What switchover, failover and the restore of a cluster share: following a change to its end, and telling how it went.

use std::time::Duration;

use pgherd_api::change::{Change, ChangeKind, ChangeState};
use tokio::time::Instant;

use crate::args::Global;
use crate::connect::Agents;
use crate::failure::Failure;
use crate::output::numbers::span;
use crate::output::{note, print_json, print_line};

const ASK_EVERY: Duration = Duration::from_millis(200);
/// The agent that took the request may be the one that goes down with it; the others take a moment to know.
const SILENCE: Duration = Duration::from_secs(15);

/// A name for this request, so that asking twice is asking once. It needs to be unique, not secret.
pub(super) fn request_id() -> String {
    let now = jiff::Timestamp::now().as_nanosecond();
    format!("{now:x}-{:x}", std::process::id())
}

/// Follows a change until it is over or `within` has passed. Ctrl-C leaves it to go on.
pub(super) async fn follow(
    agents: &Agents,
    global: &Global,
    begun: Change,
    within: Duration,
) -> Result<(), Failure> {
    let interrupted = tokio::signal::ctrl_c();
    let change = tokio::select! {
        ended = until_over(agents, begun, within) => ended?,
        _ = interrupted => {
            note("the herd goes on with it; pgherd status shows how far it has come");
            return Err(Failure::Interrupted);
        }
    };
    if global.json {
        print_json(&change)?;
    }
    tell(&change, global)
}

async fn until_over(agents: &Agents, begun: Change, within: Duration) -> Result<Change, Failure> {
    let deadline = Instant::now() + within;
    let (mut change, mut told, mut heard) = (begun, 0, Instant::now());
    loop {
        for step in change.steps.iter().skip(told) {
            note(&step.what);
        }
        told = change.steps.len().max(told);
        if change.state.is_over() || change.state == ChangeState::Scheduled {
            return Ok(change);
        }
        if Instant::now() > deadline {
            return Err(Failure::timed_out(format!(
                "{} has not ended in {}",
                name(&change),
                span(within.as_millis() as u64)
            ))
            .hint("pgherd status shows where it stands, pgherd explain what it waits for"));
        }
        tokio::time::sleep(ASK_EVERY).await;
        match agents.call(async |client| client.change(&change.request_id).await).await {
            Ok(news) => (change, heard) = (news, Instant::now()),
            Err(failure) if heard.elapsed() > SILENCE => return Err(failure),
            Err(_) => {}
        }
    }
}

fn name(change: &Change) -> &'static str {
    match change.kind {
        ChangeKind::Switchover => "the switchover",
        ChangeKind::Failover => "the failover",
        ChangeKind::Restore => "the restore of the cluster",
    }
}

fn tell(change: &Change, global: &Global) -> Result<(), Failure> {
    match change.state {
        ChangeState::Failed => {
            return Err(match &change.error {
                Some(error) => error.clone().into(),
                None => Failure::failed(format!("{} failed", name(change))).hint("pgherd history tells more"),
            });
        }
        ChangeState::Cancelled => {
            return Err(Failure::failed(format!("{} was cancelled", name(change))));
        }
        ChangeState::Done | ChangeState::Running | ChangeState::Scheduled => {}
    }
    if global.json {
        return Ok(());
    }
    let gap = change.write_gap_ms.map_or(String::new(), |ms| format!("; writes waited {}", span(ms)));
    let term = change.term.map_or(String::new(), |term| format!(" in term {term}"));
    let to = change.to.as_deref().unwrap_or("another node");
    print_line(&format!("{to} is primary of cluster {}{term}{gap}", change.cluster))?;
    if !change.unreached.is_empty() {
        note(&format!(
            "not reached, and possibly holding acknowledged commits that are gone: {}",
            change.unreached.join(", ")
        ));
    }
    Ok(())
}

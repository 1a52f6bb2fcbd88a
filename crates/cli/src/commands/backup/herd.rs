//! A base backup that an agent of the herd takes.

use std::time::Duration;

use pgherd_agent::backups::Progress;
use pgherd_api::change::BackupRequest;
use pgherd_api::status;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::args::Global;
use crate::connect::Agents;
use crate::failure::Failure;
use crate::output::{note, print_json, print_line, progress};

const ASK_EVERY: Duration = Duration::from_millis(300);
/// One that was not begun by then is not going to be: nobody sees to the repository.
const BEGUN_WITHIN: Duration = Duration::from_secs(60);
/// Agents that are heard no more.
const SILENCE: Duration = Duration::from_secs(15);

/// Asks for one, and waits until it is there.
pub(super) async fn create(global: &Global) -> Result<(), Failure> {
    let agents = Agents::find(global)?;
    let request = BackupRequest { cluster: global.cluster.clone() };
    let asked = agents.call(async |client| client.backup(&request).await).await?;
    let (progress, seen) = watch::channel(Progress::default());
    let work = until_ended(&agents, &asked.cluster, asked.number, &progress);
    let ended = match progress::shown("reading", "waiting for the WAL of the backup", seen, work).await {
        Ok(ended) => ended?,
        Err(interrupted) => {
            note("the herd goes on with it; pgherd status shows how far it is");
            return Err(interrupted);
        }
    };
    if let Some(why) = &ended.failed {
        return Err(Failure::failed(format!("the base backup of {} has failed", ended.node))
            .because(why)
            .hint("pgherd logs says more; the herd tries again by itself"));
    }
    if global.json {
        return print_json(&ended);
    }
    note(&format!("base backup of {}, taken by its agent", ended.node));
    print_line(ended.name.as_deref().unwrap_or_default())
}

async fn until_ended(
    agents: &Agents,
    cluster: &str,
    number: u64,
    progress: &watch::Sender<Progress>,
) -> Result<status::BackupEnded, Failure> {
    let (asked, mut heard, mut begun) = (Instant::now(), Instant::now(), false);
    loop {
        match agents.call(async |client| client.status().await).await {
            Ok(status) => {
                heard = Instant::now();
                let cluster = status.clusters.into_iter().find(|known| known.name == cluster);
                let Some(backup) = cluster.and_then(|cluster| cluster.backup) else {
                    return Err(Failure::failed("the herd file names no repository any more"));
                };
                if let Some(running) = backup.running.filter(|running| running.number >= number) {
                    begun = true;
                    let (done_bytes, total_bytes) =
                        (running.done_bytes.unwrap_or(0), running.total_bytes.unwrap_or(0));
                    let held_to = running.held_back_to;
                    progress.send_replace(Progress {
                        done_bytes,
                        total_bytes,
                        held_to,
                        ..Progress::default()
                    });
                }
                // A later one contains what was asked for as well.
                if let Some(ended) = backup.ended.filter(|ended| ended.number >= number) {
                    return Ok(ended);
                }
                if !begun && asked.elapsed() > BEGUN_WITHIN {
                    let why = backup.trouble.unwrap_or_else(|| "another one is under way".to_owned());
                    return Err(Failure::timed_out("the base backup has not been begun in a minute")
                        .because(why)
                        .hint("it is begun as soon as it can be; pgherd status shows how far it is"));
                }
            }
            Err(failure) if heard.elapsed() > SILENCE => return Err(failure),
            Err(_) => {}
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

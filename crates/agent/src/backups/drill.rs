//! Whether a backup can be restored, by restoring it: into a scratch server, up to a moment, with everything looked at there.
//!
//! ```text
//! restore       every frame and file against its hash
//! recovery      to the moment, and to where the plan said that it ends
//! queries       those of whoever runs the drill: no error, and no row that begins with false or null
//! indexes       amcheck: each B-tree against its order and its table
//! checksums     each page of the server, stopped cleanly
//! ```
//!
//! What fails first does not hide the rest: whatever can still be checked is. Leaves out: when, and what is done about it. Hazard: it takes disk, processor and memory
//! of a host that has other work; so it runs below everything else, and only where it fits with much to spare.

use std::path::Path;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use pgherd_api::backup::{Drill, DrillCheck, DrillOutcome, DrillRecovery};
use pgherd_backup::wal::History;
use pgherd_core::types::{Lsn, Timeline};
use pgherd_postgres::scratch::{Checksums, checksums};
use pgherd_postgres::sql::{FirstField, SearchPath, Session, name as quoted};
use tokio::sync::watch;

use super::Progress;
use super::catalog::{self, Catalog, CatalogError, time};
use super::scratch::{Ready, Running};
use super::tables::{databases, said};

/// Of an index that is damaged, or a query that fails, so many are told.
const MAX_TOLD: usize = 20;
/// For one statement of whoever runs it, and one index.
const STATEMENT_TIMEOUT: &str = "4h";
/// Of what is looked at with, in a server that is thrown away.
const OWN_SCHEMA: &str = "pgherd_drill";
/// The last checkpoint writes what fits into its memory.
const STOPPING: Duration = Duration::from_secs(600);

/// A question of whoever runs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    pub database: String,
    pub statement: String,
}

impl std::str::FromStr for Query {
    type Err = String;

    /// A database, `=` and a statement.
    fn from_str(text: &str) -> Result<Query, String> {
        let parsed = text.split_once('=').filter(|(database, statement)| {
            !database.is_empty() && !database.contains(char::is_whitespace) && !statement.trim().is_empty()
        });
        let (database, statement) =
            parsed.ok_or("it is a database, = and a statement: shop=SELECT count(*) > 0 FROM orders")?;
        Ok(Query { database: database.to_owned(), statement: statement.to_owned() })
    }
}

/// What is looked at.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    pub queries: Vec<Query>,
    pub without_amcheck: bool,
}

/// Any moment of the recovery window, as a target's time. None where there is no window, or nobody knows when it ends.
pub async fn random_moment(file: &Path, system: Option<&str>) -> Result<Option<String>, CatalogError> {
    let catalog = Catalog::open(file, system).await?;
    let Some(window) = catalog::list(&catalog).await?.recovery_window else { return Ok(None) };
    let at = |text: &str| text.parse::<Timestamp>().ok().map(Timestamp::as_microsecond);
    let (Some(from), Some(to)) = (at(&window.from), window.to.as_deref().and_then(at)) else {
        return Ok(None);
    };
    let mut bytes = [0; 8];
    // Without randomness it is the first moment, which is as good as any.
    let _drawn = aws_lc_rs::rand::fill(&mut bytes);
    // Not the last microsecond: recovery to a time ends at what comes behind it.
    let span = to.saturating_sub(from).max(1) as u64;
    let chosen = from.saturating_add((u64::from_le_bytes(bytes) % span) as i64);
    Ok(Timestamp::from_microsecond(chosen).ok().map(time))
}

/// Runs one to its end. It has a report in any case.
pub async fn run(
    ready: Ready,
    wanted: &Wanted,
    readers: usize,
    rate: Option<std::num::NonZeroU64>,
    progress: &watch::Sender<Progress>,
) -> Drill {
    let (began, at) = (Instant::now(), Timestamp::now());
    let plan = ready.report();
    let mut drill = Drill {
        repository: plan.repository.clone(),
        system_identifier: plan.system_identifier.clone(),
        postgresql_version: plan.postgresql_version.clone(),
        backup: plan.backup.clone(),
        target: plan.target.clone(),
        at: time(at),
        passed: false,
        seconds: 0.0,
        files: plan.files,
        bytes: plan.bytes,
        restore_seconds: None,
        recovery: None,
        checks: Vec::new(),
    };
    let note = format!("A drill of backup {} of cluster {}.", plan.backup, plan.system_identifier);
    match ready.run(&note, readers, rate, progress).await {
        Ok(running) => looked_at(running, wanted, &mut drill, progress).await,
        Err(error) => {
            let why = said(&error);
            drill.checks.push(check("recovery", DrillOutcome::Failed, vec![why], began));
        }
    }
    drill.passed = drill.checks.iter().all(|check| check.outcome != DrillOutcome::Failed);
    drill.seconds = began.elapsed().as_secs_f64();
    drill
}

fn check(name: &str, outcome: DrillOutcome, told: Vec<String>, since: Instant) -> DrillCheck {
    DrillCheck { name: name.to_owned(), outcome, told, seconds: since.elapsed().as_secs_f64() }
}

async fn looked_at(
    mut running: Running,
    wanted: &Wanted,
    drill: &mut Drill,
    progress: &watch::Sender<Progress>,
) {
    let step = |step: &'static str| {
        progress.send_replace(Progress { step: Some(step), ..Progress::default() });
    };
    drill.restore_seconds = Some(running.restored.seconds);
    drill.recovery = Some(DrillRecovery {
        wal_bytes: running.wal_bytes,
        seconds: running.recovery.as_secs_f64(),
        lsn: running.plan.end.lsn.clone(),
        timeline: running.plan.end.timeline,
        last: running.plan.end.last.clone(),
    });
    step("looking where it ended");
    let since = Instant::now();
    let came = ended_as_planned(&mut running).await;
    drill.checks.push(from("recovery", came, since));
    if !wanted.queries.is_empty() {
        step("asking the queries");
        let since = Instant::now();
        let came = queries(&mut running, &wanted.queries).await;
        drill.checks.push(from("queries", came, since));
    }
    if !wanted.without_amcheck {
        step("checking the indexes");
        let since = Instant::now();
        let came = indexes(&mut running, progress).await;
        drill.checks.push(from("indexes", came, since));
    }
    step("checking the pages");
    let since = Instant::now();
    let came = pages(&mut running).await;
    drill.checks.push(from("checksums", came, since));
    step("removing it");
    let dir = running.scratch.dir().display().to_string();
    if let Err(error) = running.scratch.remove().await {
        tracing::warn!(dir, error = crate::causes::on_one_line(&error), "a scratch server is left");
    }
}

/// What a check found: how it came out, with what there is to be said.
type Found = Result<(DrillOutcome, Vec<String>), Problem>;
type Problem = Box<dyn std::error::Error + Send + Sync>;

fn from(name: &str, found: Found, since: Instant) -> DrillCheck {
    match found {
        Ok((outcome, told)) => check(name, outcome, told, since),
        Err(error) => check(name, DrillOutcome::Failed, vec![said(&*error)], since),
    }
}

/// A server that was promoted says in the history of its timeline where it left the one before.
async fn ended_as_planned(running: &mut Running) -> Found {
    let session = running.scratch.connect("postgres", &running.how).await?;
    let row = session.query_one("SELECT pg_walfile_name(pg_current_wal_insert_lsn())", &[]).await?;
    let name: String = row.get(0);
    let timeline = Timeline(u32::from_str_radix(name.get(..8).unwrap_or_default(), 16)?);
    let file = format!("pg_wal/{:08X}.history", timeline.0);
    let row = session.query_one("SELECT pg_read_binary_file($1)", &[&file]).await?;
    let history = History::parse(timeline, row.get(0))?;
    let planned: Lsn = running.plan.end.lsn.parse()?;
    let Some(last) = history.forks().last() else {
        return Ok((DrillOutcome::Failed, vec!["it was not promoted".to_owned()]));
    };
    let (ended, on) = (last.until, last.timeline);
    // WAL that has come since the plan was made is recovered, too.
    let to_the_end = running.plan.target_action.is_none();
    let same =
        if to_the_end { ended >= planned } else { ended == planned && on.0 == running.plan.end.timeline };
    Ok(match same {
        true => (DrillOutcome::Passed, vec![format!("ended at {ended} on timeline {on}")]),
        false => (
            DrillOutcome::Failed,
            vec![format!(
                "ended at {ended} on timeline {on}, and was to end at {planned} on timeline {}",
                running.plan.end.timeline
            )],
        ),
    })
}

async fn session(running: &mut Running, database: &str, path: SearchPath) -> Result<Session, Problem> {
    let session = running.scratch.connect_with(database, path, &running.how).await?;
    session.batch_execute(&format!("SET statement_timeout = '{STATEMENT_TIMEOUT}'")).await?;
    Ok(session)
}

async fn queries(running: &mut Running, queries: &[Query]) -> Found {
    let mut failed = Vec::new();
    for query in queries {
        let database = query.database.as_str();
        let came = async {
            let session = session(running, database, SearchPath::OfDatabase).await?;
            Ok::<_, Problem>(session.first_field(&query.statement).await?)
        };
        let why = match came.await {
            Ok(first) => match verdict(&first) {
                None => continue,
                Some(why) => why.to_owned(),
            },
            Err(error) => said(&*error),
        };
        failed.push(format!("{} in {database}: {why}", query.statement.trim()));
    }
    Ok(outcome(failed, counted(queries.len(), "query", "queries")))
}

/// Why an answer is none that somebody hoped for.
fn verdict(first: &FirstField) -> Option<&'static str> {
    match first {
        FirstField::NoRows => None,
        FirstField::Empty => Some("there was no row"),
        FirstField::Null => Some("it is null"),
        FirstField::Value(value) => (value == "f").then_some("it is false"),
    }
}

/// Every B-tree of every database.
async fn indexes(running: &mut Running, progress: &watch::Sender<Progress>) -> Found {
    let (mut failed, mut checked, mut without) = (Vec::new(), 0_usize, Vec::new());
    for database in databases(running).await? {
        let session = session(running, &database, SearchPath::Empty).await?;
        let available =
            session.query_opt("SELECT FROM pg_available_extensions WHERE name = 'amcheck'", &[]).await?;
        if available.is_none() {
            without.push(database);
            continue;
        }
        // Where it is not installed there: whatever schema a session would take may not be there.
        let install =
            format!("CREATE SCHEMA {OWN_SCHEMA}; CREATE EXTENSION IF NOT EXISTS amcheck SCHEMA {OWN_SCHEMA}");
        session.batch_execute(&install).await?;
        let row = session
            .query_one(
                "SELECT nspname::text FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace WHERE extname = 'amcheck'",
                &[],
            )
            .await?;
        let schema: String = row.get(0);
        let indexes = session
            .query(
                "SELECT c.oid, c.oid::regclass::text FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam \
                 WHERE a.amname = 'btree' AND c.relkind = 'i' AND c.relpersistence = 'p' AND i.indisvalid AND i.indisready ORDER BY 1",
                &[],
            )
            .await?;
        let statement = format!("SELECT {}.bt_index_check($1::oid::regclass, true)", quoted(&schema));
        let statement = session.prepare(&statement).await?;
        for row in indexes {
            let (oid, index): (u32, String) = (row.get(0), row.get(1));
            if let Err(error) = session.execute(&statement, &[&oid]).await {
                failed.push(format!("{index} in {database}: {}", said(&error)));
            }
            checked += 1;
            progress.send_modify(|progress| progress.done_files = checked as u64);
        }
    }
    if checked == 0 && !without.is_empty() {
        return Ok((
            DrillOutcome::Skipped,
            vec!["the extension amcheck is not installed on this host".to_owned()],
        ));
    }
    Ok(outcome(failed, counted(checked, "index", "indexes")))
}

/// Every page, when nobody writes any more.
async fn pages(running: &mut Running) -> Found {
    running.scratch.stop(STOPPING).await?;
    Ok(match checksums(&running.installation, &running.scratch.data_dir()).await? {
        Checksums::Off => (DrillOutcome::Skipped, vec!["the cluster has no data checksums".to_owned()]),
        Checksums::Good { files, blocks } => {
            (DrillOutcome::Passed, vec![format!("{blocks} pages in {files} files")])
        }
        Checksums::Bad { blocks, mut told } => {
            told.truncate(MAX_TOLD);
            told.insert(0, format!("{blocks} pages are damaged"));
            (DrillOutcome::Failed, told)
        }
    })
}

fn outcome(mut failed: Vec<String>, all: String) -> (DrillOutcome, Vec<String>) {
    if failed.is_empty() {
        return (DrillOutcome::Passed, vec![all]);
    }
    let more = failed.len().saturating_sub(MAX_TOLD);
    failed.truncate(MAX_TOLD);
    if more > 0 {
        failed.push(format!("and {more} more"));
    }
    (DrillOutcome::Failed, failed)
}

fn counted(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_has_its_database_in_front() {
        let parsed: Query = "shop=SELECT a = 1 FROM t".parse().unwrap();
        assert_eq!((parsed.database.as_str(), parsed.statement.as_str()), ("shop", "SELECT a = 1 FROM t"));
        for wrong in ["SELECT 1", "=SELECT 1", "shop=", "SELECT a = 1"] {
            assert!(wrong.parse::<Query>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_query_passes_unless_it_says_no_or_nothing() {
        assert_eq!(verdict(&FirstField::NoRows), None, "a block of code");
        assert_eq!(verdict(&FirstField::Value("t".to_owned())), None);
        assert_eq!(
            verdict(&FirstField::Value("0".to_owned())),
            None,
            "it is a number, and says nothing of good or bad"
        );
        for bad in [FirstField::Empty, FirstField::Null, FirstField::Value("f".to_owned())] {
            assert!(verdict(&bad).is_some(), "{bad:?}");
        }
    }

    #[test]
    fn what_fails_is_told_and_not_without_end() {
        let failed: Vec<String> = (0..MAX_TOLD + 5).map(|number| number.to_string()).collect();
        let (came, told) = outcome(failed, String::new());
        assert_eq!((came, told.len()), (DrillOutcome::Failed, MAX_TOLD + 1));
        assert_eq!(told.last().map(String::as_str), Some("and 5 more"));
        assert_eq!(
            outcome(Vec::new(), "7 indexes".to_owned()),
            (DrillOutcome::Passed, vec!["7 indexes".to_owned()])
        );
    }
}

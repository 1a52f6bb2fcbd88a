//! A server with work on it, a repository, and an archive that its WAL comes into.

use std::collections::BTreeSet;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use jiff::Timestamp;
use pgherd_agent::backups::Progress;
use pgherd_agent::backups::take::{Find, Order, Source, TakeError, Taken, take};
use pgherd_backup::format::Repository;
use pgherd_backup::name::BackupId;
use pgherd_backup::store::Store;
use pgherd_backup::wal::{Archive, Segment, Segments};
use pgherd_core::types::{Lsn, Term};
use pgherd_postgres::Instance;
use pgherd_postgres::base_backup::Checkpoint;
use pgherd_postgres::control::ControlFile;
use pgherd_postgres::sql::Session;
use pgherd_postgres::wal::{WalFiles, history_name, segments};
use tokio::process::{Child, Command};
use tokio::sync::watch;

use crate::harness::{Herd, Node, SOON, ask, superuser};

/// Readers of a backup in tests: more than one, on two processors.
pub(crate) const READERS: usize = 3;

/// A primary with standbys, and where its backups go.
pub(crate) struct Original {
    pub(crate) herd: Herd,
    pub(crate) nodes: Vec<Node>,
    pub(crate) repository: Repository,
    pub(crate) archive: Archive,
}

impl Original {
    pub(crate) async fn new(standbys: &[&str]) -> Original {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", standbys).await;
        let dir = herd.path().join("repository");
        std::fs::create_dir(&dir).unwrap();
        let repository = Repository::create(Store::directory(dir), None, Timestamp::now()).await.unwrap();
        let control = ControlFile::read(&nodes[0].instance().control_file()).unwrap();
        let segments = Segments::new(control.wal_segment_bytes).unwrap();
        let archive = Archive::new(&repository, control.system_id, segments);
        Original { herd, nodes, repository, archive }
    }

    pub(crate) fn primary(&self) -> &Instance {
        self.nodes[0].instance()
    }

    pub(crate) async fn session(&self) -> Session {
        superuser(self.primary()).await
    }

    /// One statement after the other, each in a transaction of its own.
    pub(crate) async fn run(&self, statements: &str) {
        run(&self.session().await, statements).await.unwrap();
    }

    pub(crate) async fn pgbench(&self, options: &[&str]) {
        let ended = self.start_pgbench(options).wait().await.unwrap();
        assert!(ended.success(), "pgbench: {ended}");
    }

    pub(crate) fn start_pgbench(&self, options: &[&str]) -> Child {
        let instance = self.primary();
        Command::new(instance.installation.program("pgbench"))
            .args(["-n", "-h", instance.socket_dir.to_str().unwrap(), "-p", &instance.port.to_string()])
            .args(["-U", "postgres", "-d", "postgres"])
            .args(options)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    }

    /// Archives what becomes complete, until it is dropped.
    pub(crate) fn archiving(&self) -> Archiving {
        self.archiving_of(0)
    }

    pub(crate) fn archiving_of(&self, node: usize) -> Archiving {
        let (instance, archive) = (self.nodes[node].instance().clone(), self.archive.clone());
        let work = tokio::spawn(async move {
            let session = superuser(&instance).await;
            let mut done = BTreeSet::new();
            loop {
                archive_complete(&instance, &session, &archive, &mut done).await;
                // sleep: between two looks at pg_wal.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        Archiving(work)
    }

    /// Completes the segment that is being written, waits until all is archived, and returns the position up to there.
    pub(crate) async fn archive_everything(&self) -> Lsn {
        self.archive_everything_of(0).await
    }

    pub(crate) async fn archive_everything_of(&self, node: usize) -> Lsn {
        let instance = self.nodes[node].instance();
        let session = superuser(instance).await;
        // Something is in the segment, or it would not be completed.
        let at: Lsn = ask(&session, "SELECT pg_create_restore_point('everything')").await.parse().unwrap();
        ask(&session, "SELECT pg_switch_wal()").await;
        archive_complete(instance, &session, &self.archive, &mut BTreeSet::new()).await;
        at
    }

    /// The archive as files, for a `restore_command` that copies them.
    pub(crate) async fn archive_as_files(&self) -> PathBuf {
        self.archive_as_files_of(0).await
    }

    pub(crate) async fn archive_as_files_of(&self, node: usize) -> PathBuf {
        let dir = self.herd.path().join("archive");
        std::fs::create_dir_all(&dir).unwrap();
        let instance = self.nodes[node].instance();
        let files = wal_files(instance);
        let (timeline, first, end) = complete(&superuser(instance).await, &files).await;
        let history = history_name(timeline);
        std::fs::copy(files.dir.join(&history), dir.join(&history)).unwrap();
        for number in first..end {
            match self.archive.segment(Segment { timeline, number }).await {
                Ok(content) => {
                    std::fs::write(dir.join(files.segment_name(timeline, number)), content).unwrap();
                }
                Err(error) if error.is_absent() => {}
                Err(error) => panic!("{error}"),
            }
        }
        dir
    }

    pub(crate) fn source(&self, node: usize, session: Session, primary: Option<Session>) -> Source {
        Source { data_dir: self.nodes[node].instance().data_dir.clone(), session, primary, probe: None }
    }

    /// Takes a backup of the primary.
    pub(crate) async fn take(&self, order: &Order) -> Result<Taken, TakeError> {
        self.take_of(0, order).await
    }

    /// Takes a backup of a node that is a primary.
    pub(crate) async fn take_of(&self, node: usize, order: &Order) -> Result<Taken, TakeError> {
        let source = self.source(node, superuser(self.nodes[node].instance()).await, None);
        take(&self.repository, source, order, &watch::Sender::new(Progress::default())).await
    }

    pub(crate) async fn full(&self) -> Taken {
        self.take(&order(None)).await.unwrap()
    }

    /// What is in the tables of the primary.
    pub(crate) async fn digest(&self) -> Vec<String> {
        digest(&self.session().await).await
    }
}

pub(crate) fn order(parent: Option<BackupId>) -> Order {
    Order {
        parent,
        find: Find::Comparison,
        node: "a".parse().unwrap(),
        term: Term(1),
        checkpoint: Checkpoint::Fast,
        readers: READERS,
        max_bytes_per_second: None,
        throttle: None,
        silence: Duration::from_secs(3600),
        settle_every: Duration::from_secs(3600),
        refresh_bytes: 0,
        wal_deadline: SOON,
    }
}

/// One that takes its time: some of it goes by while somebody does something.
pub(crate) fn slow(parent: Option<BackupId>, bytes_per_second: u64) -> Order {
    Order { max_bytes_per_second: NonZeroU64::new(bytes_per_second), ..order(parent) }
}

pub(crate) struct Archiving(tokio::task::JoinHandle<()>);

impl Drop for Archiving {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn wal_files(instance: &Instance) -> WalFiles {
    WalFiles::of(instance, &ControlFile::read(&instance.control_file()).unwrap()).unwrap()
}

/// The timeline of a primary, with the first and the end of its complete segments that are there.
async fn complete(session: &Session, files: &WalFiles) -> (pgherd_core::types::Timeline, u64, u64) {
    // Right at a boundary the name is that of the segment that ends there.
    let name = ask(session, "SELECT pg_walfile_name(pg_current_wal_flush_lsn() + 1)").await;
    let (timeline, current) = files.parse_segment_name(&name).unwrap();
    let first = segments(files, timeline).unwrap().into_iter().next().unwrap_or(current);
    (timeline, first, current)
}

async fn archive_complete(
    instance: &Instance,
    session: &Session,
    archive: &Archive,
    done: &mut BTreeSet<u64>,
) {
    let files = wal_files(instance);
    let (timeline, first, end) = complete(session, &files).await;
    if done.is_empty() {
        let history = std::fs::read(files.dir.join(history_name(timeline))).unwrap();
        archive.put_history(timeline, &history).await.unwrap();
    }
    for number in first..end {
        if done.contains(&number) {
            continue;
        }
        // PostgreSQL may have removed an old one since.
        let Ok(content) = std::fs::read(files.segment_path(timeline, number)) else { continue };
        archive.put_segment(Segment { timeline, number }, &content).await.unwrap();
        done.insert(number);
    }
}

pub(crate) async fn run(session: &Session, statements: &str) -> Result<(), tokio_postgres::Error> {
    for statement in statements.split(';') {
        session.batch_execute(statement).await?;
    }
    Ok(())
}

/// Every table that users have, with the number of its rows and a sum over all that is in them.
pub(crate) async fn digest(session: &Session) -> Vec<String> {
    let tables = "SELECT c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace \
                  WHERE relkind = 'r' AND relpersistence = 'p' AND nspname = 'public' ORDER BY 1";
    let rows = session.query(tables, &[]).await.unwrap();
    let mut all = Vec::new();
    for row in rows {
        let table: String = row.get(0);
        let sum =
            format!("SELECT count(*) || ' rows, ' || coalesce(sum(hashtext(t::text)), 0) FROM {table} t");
        all.push(format!("{table}: {}", ask(session, &sum).await));
    }
    all
}

/// Every file below a directory with its content, but for what differs by nature.
pub(crate) fn files_of(dir: &Path) -> std::collections::BTreeMap<PathBuf, Vec<u8>> {
    let mut files = std::collections::BTreeMap::new();
    let mut open = vec![dir.to_owned()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => open.push(path),
                false => {
                    let content = std::fs::read(&path).unwrap();
                    files.insert(path.strip_prefix(dir).unwrap().to_owned(), content);
                }
            }
        }
    }
    files
}

//! A herd's servers with a repository beside them, and what a test asks of both.

use std::time::Duration;

use pgherd_agent::archive::{Archiving, Gap, Order, Status};
use pgherd_backup::format::Repository;
use pgherd_backup::receive::Branch;
use pgherd_backup::store::Store;
use pgherd_backup::wal::{Archive, Inventory, Segment, Segments};
use pgherd_core::types::{Lsn, SystemId, Timeline};
use pgherd_postgres::conf::SyncNames;
use pgherd_postgres::replication::{SlotName, Source};
use pgherd_postgres::sql::Session;
use pgherd_postgres::{roles, sync_names};

use crate::harness::{Herd, Node, SOON, ask, until};

pub(crate) const SLOT: &str = "keeper";
/// A backlog, on a machine that does other things as well.
const LONG: Duration = Duration::from_secs(90);
pub(crate) const SEGMENT_BYTES: u64 = 16 << 20;

pub(crate) struct Scene {
    pub(crate) herd: Herd,
    pub(crate) nodes: Vec<Node>,
    pub(crate) repository: Repository,
    pub(crate) system: SystemId,
}

impl Scene {
    /// A primary `a` that waits for nobody, its standbys, and an empty repository. Every server keeps its WAL, so that it can
    /// be compared.
    pub(crate) async fn new(standbys: &[&str]) -> Scene {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", standbys).await;
        sync_names::set(nodes[0].instance(), Some(&nodes[0].server), &SyncNames::Empty).await.unwrap();
        sync_names::prove(&nodes[0].server, &SyncNames::Empty, SOON).await.unwrap();
        let place = herd.path().join("repository");
        std::fs::create_dir(&place).unwrap();
        let now = "2026-11-22T00:00:00Z".parse().unwrap();
        let repository = Repository::create(Store::directory(place), None, now).await.unwrap();
        let session = nodes[0].session().await;
        let system = ask(&session, "SELECT system_identifier FROM pg_control_system()").await;
        for node in &nodes {
            let session = node.session().await;
            configure(&session, "wal_keep_size", "4GB").await;
            make_slot(&session).await;
        }
        Scene { herd, nodes, repository, system: system.parse().unwrap() }
    }

    pub(crate) async fn order(&self, node: usize) -> Order {
        let node = self.nodes[node].instance();
        let password = &self.herd.secrets.replication;
        let remote = self.herd.remote(node, roles::REPLICATION, password).await;
        Order {
            source: Source::Remote(Box::new(remote)),
            slot: SlotName::new(SLOT),
            repository: self.repository.clone(),
            system: self.system,
            branch: Branch::Refuse,
            gap: Gap::Refuse,
            piece_every: None,
            until: None,
        }
    }

    pub(crate) fn archive(&self) -> Archive {
        Archive::new(&self.repository, self.system, Segments::new(SEGMENT_BYTES as u32).unwrap())
    }

    pub(crate) async fn inventory(&self) -> Inventory {
        self.archive().inventory().await.unwrap()
    }

    /// Compares what is archived of a timeline and later ones with the files of a server; says which segments it has.
    pub(crate) async fn compare(&self, node: usize, from: Timeline) -> Vec<(Timeline, u64)> {
        let files = self.nodes[node].instance().pg_wal();
        let (archive, segments) = (self.archive(), Segments::new(SEGMENT_BYTES as u32).unwrap());
        let mut compared = Vec::new();
        for segment in self.inventory().await.segments().filter(|segment| segment.timeline >= from) {
            let file = files.join(segments.file_name(segment));
            // A switch leaves the old timeline's last file under another name.
            if let Ok(there) = std::fs::read(&file) {
                let archived = archive.segment(segment).await.unwrap();
                assert!(archived == there, "{} differs", file.display());
                compared.push((segment.timeline, segment.number));
            }
        }
        compared
    }

    /// Whether every segment of a timeline from one number up to another is archived.
    pub(crate) fn has_all(inventory: &Inventory, timeline: Timeline, first: u64, behind: u64) -> bool {
        (first..behind).all(|number| inventory.has(Segment { timeline, number }))
    }
}

pub(crate) async fn configure(session: &Session, name: &str, value: &str) {
    session.batch_execute(&format!("ALTER SYSTEM SET {name} = '{value}'")).await.unwrap();
    session.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    let shown = format!("SELECT current_setting('{name}')");
    until("the setting is in force", async || (ask(session, &shown).await == value).then_some(())).await;
}

pub(crate) async fn make_slot(session: &Session) {
    ask(session, &format!("SELECT pg_create_physical_replication_slot('{SLOT}', true)")).await;
}

/// Writes, and ends the segment; the first position of the next one.
pub(crate) async fn fill(session: &Session) -> Lsn {
    session.batch_execute("CREATE TABLE IF NOT EXISTS filled (n int, text text)").await.unwrap();
    let text = "INSERT INTO filled SELECT n, repeat(md5(n::text), 8) FROM generate_series(1, 20000) AS n";
    session.batch_execute(text).await.unwrap();
    let end: Lsn = ask(session, "SELECT pg_switch_wal()").await.parse().unwrap();
    // Something of the next segment, or the end of this one is the server's end.
    session.batch_execute("INSERT INTO filled VALUES (0, '')").await.unwrap();
    Lsn(end.0.div_ceil(SEGMENT_BYTES) * SEGMENT_BYTES)
}

/// Writes a little, without ending the segment; up to where it has been flushed.
pub(crate) async fn write(session: &Session) -> Lsn {
    session.batch_execute("CREATE TABLE IF NOT EXISTS little AS SELECT 1 AS n").await.unwrap();
    session.batch_execute("INSERT INTO little SELECT generate_series(1, 1000)").await.unwrap();
    ask(session, "SELECT pg_current_wal_flush_lsn()").await.parse().unwrap()
}

/// Waits until a status is as it is wanted to be.
pub(crate) async fn shows(archiving: &Archiving, what: &str, is_so: impl Fn(&Status) -> bool) -> Status {
    let mut status = archiving.status();
    let found = tokio::time::timeout(LONG, status.wait_for(|status| is_so(status))).await;
    match found {
        Ok(found) => found.unwrap().clone(),
        Err(_) => panic!("not within {LONG:?}: {what}: {:?}", archiving.status().borrow()),
    }
}

pub(crate) async fn durable(archiving: &Archiving, up_to: Lsn) -> Status {
    shows(archiving, "everything is archived", |status| status.durable >= Some(up_to)).await
}

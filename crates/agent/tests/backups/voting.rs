//! A repository that votes: commits wait for it, a seal ends whoever confirms them, and what was acknowledged can be had from it alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pgherd_agent::archive::voting::Votes;
use pgherd_agent::archive::{ArchiveError, Archiving, State};
use pgherd_agent::backups::Progress;
use pgherd_agent::backups::voted::{self, Voted};
use pgherd_backup::name::Place;
use pgherd_backup::voter::{Sealed, Voter};
use pgherd_core::action::StreamOrder;
use pgherd_core::observation::Copy;
use pgherd_core::record::{self, Line, Position, Record};
use pgherd_core::spec::RepositorySpec;
use pgherd_core::spec::backup::Location;
use pgherd_core::types::{Lsn, Member, Stream, Term, Timeline};
use pgherd_postgres::Instance;
use pgherd_postgres::clone::Filling;
use pgherd_postgres::conf::SyncNames;
use pgherd_postgres::process::{Server, StopMode};
use pgherd_postgres::promote::{Order, promote};
use pgherd_postgres::replication::{SlotName, Source};
use pgherd_postgres::{conf, roles, seal, slots, sync_names};
use tokio::sync::watch;

use crate::harness::{self, Node, SOON, ask, settings, start, story, until};
use crate::original::{Original, run};

/// What the harness's clusters begin on.
const TIMELINE: Timeline = Timeline(2);
/// Longer than a commit takes whose confirmation is on its way.
const STALLED: Duration = Duration::from_secs(2);

/// A herd whose only voter is its repository.
struct Herd {
    original: Original,
}

fn repository() -> Member {
    "pgherd_repository_7".parse().unwrap()
}

fn stream() -> Stream {
    Stream { member: repository(), timeline: TIMELINE }
}

impl Herd {
    async fn new(standbys: &[&str]) -> Herd {
        let original = Original::new(standbys).await;
        let session = original.session().await;
        run(&session, "CREATE TABLE acknowledged (n bigint PRIMARY KEY)").await.unwrap();
        for slot in [conf::slot_name(&repository()), slots::ARCHIVE.to_owned()] {
            ask(&session, &format!("SELECT pg_create_physical_replication_slot('{slot}', true)")).await;
        }
        Herd { original }
    }

    fn voter(&self) -> Voter {
        let place = Place(self.original.archive.system());
        Voter::new(&self.original.repository, place, repository().incarnation)
    }

    /// The owner of the archive, by the order of a term.
    async fn owner(&self, term: u64) -> Archiving {
        let primary = self.original.primary();
        let password = &self.original.herd.secrets.replication;
        let remote = self.original.herd.remote(primary, roles::REPLICATION, password).await;
        Archiving::begin_voting(Votes {
            order: StreamOrder {
                member: repository(),
                term: Term(term),
                source: primary.node.clone(),
                timeline: TIMELINE,
                line: Term(1),
            },
            source: Source::Remote(Box::new(remote)),
            slot: SlotName::new(&conf::slot_name(&repository())).unwrap(),
            archive_slot: SlotName::new(slots::ARCHIVE).unwrap(),
            repository: self.original.repository.clone(),
            system: self.original.archive.system(),
            piece_every: Some(Duration::from_millis(100)),
        })
    }

    /// From here on commits wait for the repository, and for nobody else.
    async fn waits(&self) {
        let primary = &self.original.nodes[0];
        let list = SyncNames::Any { needed: 1, streams: [stream()].into() };
        sync_names::set(primary.instance(), Some(&primary.server), &list).await.unwrap();
        sync_names::prove(&primary.server, &list, SOON).await.unwrap();
    }

    /// An election of this term: it is sealed, and then looked at.
    async fn sealed(&self, term: u64) -> Sealed {
        let worth = |_: &_, copy: &Copy| Position { term: Term(1), lsn: copy.end.unwrap_or_default() };
        self.voter().seal_and_look(Term(term), worth).await.unwrap()
    }

    /// What a record says of it, as far as a copy is made by it.
    fn record(&self) -> Record {
        let mut record = Record::empty();
        record.system = Some(self.original.archive.system());
        let line = |timeline, parent, begin| Line { timeline, term: Term(1), parent, begin };
        record.lines = vec![line(Timeline(1), None, None), line(TIMELINE, Some(Timeline(1)), Some(Lsn(1)))];
        record.archive = Some(record::Archive {
            place: "file:///x".to_owned(),
            repository: Some(self.original.repository.format().repository.clone()),
            owner: "a".parse().unwrap(),
            term: Term(1),
            begun: 0,
            asked: false,
            backup: None,
            ended: None,
            drill: None,
        });
        record
    }

    fn place(&self) -> RepositorySpec {
        let location = Location::Directory(self.original.herd.path().join("repository"));
        RepositorySpec { location, secret: None }
    }
}

/// Somebody who writes one row after the other.
struct Writing {
    acknowledged: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Writing {
    async fn begin(node: &Node, from: u64) -> Writing {
        let acknowledged = Arc::new(AtomicU64::new(from));
        let (session, last) = (node.session().await, Arc::clone(&acknowledged));
        let task = tokio::spawn(async move {
            for n in from + 1.. {
                // One that ends with the server is acknowledged to nobody.
                if run(&session, &format!("INSERT INTO acknowledged VALUES ({n})")).await.is_err() {
                    return;
                }
                last.store(n, Ordering::SeqCst);
            }
        });
        Writing { acknowledged, task }
    }

    fn last(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    async fn goes_on(&self) {
        let before = self.last();
        until("rows are acknowledged", async || (self.last() >= before + 20).then_some(())).await;
    }

    /// Waits until nothing is acknowledged any more, and returns the last row that was.
    async fn stalls(&self) -> u64 {
        loop {
            let before = self.last();
            // sleep: whether another row is acknowledged.
            tokio::time::sleep(STALLED).await;
            if self.last() == before {
                return before;
            }
        }
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn votes(herd: &Herd) {
    let session = herd.original.session().await;
    let query = format!(
        "SELECT count(*) FROM pg_stat_replication WHERE application_name = '{}' AND state = 'streaming'",
        stream()
    );
    until("the repository streams", async || (ask(&session, &query).await == "1").then_some(())).await;
}

async fn rows(session: &pgherd_postgres::sql::Session) -> (u64, u64) {
    let answer = ask(session, "SELECT count(*) || ' ' || coalesce(max(n), 0) FROM acknowledged").await;
    let (count, last) = answer.split_once(' ').unwrap();
    (count.parse().unwrap(), last.parse().unwrap())
}

/// A copy that was brought up to `until` leads, and has every row that was acknowledged.
async fn leads(server: &Server, until: Lsn, acknowledged: u64) {
    let order = Order { timeline: Timeline(5), at_least: until, names: SyncNames::Empty };
    let promoted = promote(server, &order, SOON).await.unwrap();
    assert!(promoted.fork >= until, "{promoted:?}");
    let (count, last) = rows(&harness::superuser(server.instance()).await).await;
    assert_eq!(count, last, "no row is missing before the last one");
    assert!(last >= acknowledged, "row {acknowledged} was acknowledged, and there are those up to {last}");
}

async fn sealed_standby(instance: &Instance) -> Server {
    seal::seal(instance, None, None, SOON).await.unwrap();
    start(instance).await
}

story! {
    async fn commits_wait_for_the_repository_until_it_is_sealed_and_its_next_owner_goes_on() {
        let herd = Herd::new(&[]).await;
        let first = herd.owner(1).await;
        let session = herd.original.session().await;
        let mut status = first.status();
        status.wait_for(|status| status.state == State::Streaming).await.unwrap();
        let named = format!("SELECT count(*) FROM pg_stat_replication WHERE application_name = '{}' AND state = 'streaming'", stream());
        assert_eq!(ask(&session, &named).await, "0", "without a base backup it counts for nothing");
        herd.original.full().await;
        votes(&herd).await;

        herd.waits().await;
        let writing = Writing::begin(&herd.original.nodes[0], 0).await;
        writing.goes_on().await;
        first.end().await;
        let stalled = writing.stalls().await;
        assert!(stalled > 0, "nobody confirms without an owner");

        // It has died; another one goes on in the same term.
        let second = herd.owner(1).await;
        writing.goes_on().await;

        // Somebody elects. The second owner knows nothing of it, and is cut off from whoever could tell it.
        let sealed = herd.sealed(2).await;
        let acknowledged = writing.stalls().await;
        let voted = sealed.copy.unwrap().end.unwrap();
        let shown = "SELECT coalesce(max(flush_lsn), '0/0') FROM pg_stat_replication";
        let confirmed: Lsn = ask(&session, shown).await.parse().unwrap();
        assert!(voted >= confirmed, "{confirmed} was confirmed, and the vote ends at {voted}");
        let mut status = second.status();
        let ended = tokio::time::timeout(SOON, status.wait_for(|status| {
            matches!(status.last_error.as_deref(), Some(ArchiveError::Sealed { term: Term(1) }))
        }));
        ended.await.unwrap().unwrap();
        assert_eq!(writing.stalls().await, acknowledged, "it has come back, and confirms nothing");

        // The same primary goes on in a new term.
        let _third = herd.owner(2).await;
        writing.goes_on().await;
    }
}

story! {
    async fn a_standby_that_lacks_what_was_acknowledged_has_it_from_the_repository() {
        let herd = Herd::new(&["b"]).await;
        let _owner = herd.owner(1).await;
        herd.original.full().await;
        votes(&herd).await;
        herd.waits().await;
        let [a, b] = &herd.original.nodes[..] else { unreachable!() };
        let writing = Writing::begin(a, 0).await;
        writing.goes_on().await;
        b.server.stop(StopMode::Immediate, SOON).await.unwrap();
        // More than what is left of the segment in which it ends.
        let session = a.session().await;
        for _ in 0..2 {
            run(&session, "CREATE TABLE IF NOT EXISTS bulk (t text); INSERT INTO bulk SELECT repeat(md5(n::text), 30) FROM generate_series(1, 9000) n").await.unwrap();
            ask(&session, "SELECT pg_switch_wal()").await;
        }
        writing.goes_on().await;
        a.server.stop(StopMode::Immediate, SOON).await.unwrap();
        let acknowledged = writing.last();
        let copy = herd.sealed(2).await.copy.unwrap();
        let until = copy.end.unwrap();

        let server = sealed_standby(b.instance()).await;
        let instance = b.instance().clone();
        let has = pgherd_postgres::wal::end_of_wal(&instance, None).unwrap();
        assert!(has.lsn < until, "it lacks something");
        let voted = Voted::read(herd.original.archive.clone(), copy.timeline, until).await.unwrap();
        // Its own WAL is not what it is: nothing is put over it.
        let other = (has.timeline, Lsn(has.lsn.0 + 65_536));
        voted.bring(&instance, other).await.unwrap_err();
        voted.bring(&instance, (has.timeline, has.lsn)).await.unwrap();
        server.reload().unwrap();
        let now = pgherd_postgres::wal::end_of_wal(&instance, None).unwrap();
        assert_eq!((now.timeline, now.lsn), (copy.timeline, until), "what a vote would say");
        leads(&server, until, acknowledged).await;
        server.stop(StopMode::Immediate, SOON).await.unwrap();
    }
}

story! {
    async fn where_every_copy_is_lost_one_is_made_from_the_repository_with_every_acknowledged_row() {
        let herd = Herd::new(&[]).await;
        let _owner = herd.owner(1).await;
        herd.original.full().await;
        votes(&herd).await;
        herd.waits().await;
        let a = &herd.original.nodes[0];
        let writing = Writing::begin(a, 0).await;
        writing.goes_on().await;
        ask(&a.session().await, "SELECT pg_switch_wal()").await;
        writing.goes_on().await;
        a.server.stop(StopMode::Immediate, SOON).await.unwrap();
        std::fs::remove_dir_all(&a.instance().data_dir).unwrap();
        let acknowledged = writing.last();
        let copy = herd.sealed(2).await.copy.unwrap();
        let until = copy.end.unwrap();

        let instance = herd.original.herd.node("c").await;
        let filling = Filling::begin(&instance).await.unwrap();
        let progress = watch::Sender::new(Progress::default());
        let vote = (copy.timeline, until);
        let filled = voted::fill(&herd.place(), &herd.record(), vote, &filling, &progress).await.unwrap();
        assert_eq!(filled.end, until);
        filling.finish(&settings()).await.unwrap();
        let end = pgherd_postgres::wal::end_of_wal(&instance, None).unwrap();
        assert_eq!((end.timeline, end.lsn), vote, "and not a record more");
        let server = sealed_standby(&instance).await;
        server.ready(SOON).await.unwrap();
        leads(&server, until, acknowledged).await;
        server.stop(StopMode::Immediate, SOON).await.unwrap();
    }
}

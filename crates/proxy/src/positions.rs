//! How far the primary has written, and how far each standby has replayed: what it takes to read one's own writes.
//!
//! Nobody is asked for each transaction. A client that may have written notes when ([`Marks`]). A position of the primary that
//! was asked for after that moment lies behind what it wrote, and one sample serves all who wrote before it. A standby that
//! has replayed up to there shows it. Samples are taken when somebody waits for one, never more than one at a time of each
//! node, and of the primary also a moment after a write, so that whoever reads later needs not ask.
//!
//! The positions that agents tell of standbys are not used for this. They do not say which life of a server they are of, and
//! one that was killed comes back at an earlier position than it had shown (it replays from its last restartpoint, and lets
//! readers in where its pages are consistent). So a sample counts for a connection only if it was asked for after that was
//! opened: whoever answered it is the server at the other end, or one that came after it.
//!
//! Leaves out who may read there ([`crate::routes`]). Hazard: a reader that does not see what it has just written.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pgherd_core::types::{Instant, Lsn, NodeName};
use tokio::sync::{Notify, watch};

use crate::backend::Backend;
use crate::clock;
use crate::own;
use crate::pool::{Place, Worker};
use crate::routes::{Role, Route};
use crate::server::NotIn;
use crate::timer::{sleep, timeout, timeout_at};
use crate::world::World;

/// A sample of the primary follows a write so soon, and takes all writes of that time along.
const AFTER_WRITE: Duration = Duration::from_millis(5);
/// Between two samples of one node.
const BETWEEN: Duration = Duration::from_millis(1);
/// After a node that could not be asked.
const AGAIN_AFTER: Duration = Duration::from_millis(100);
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// Samples of the primary that are kept: older writes are taken for as old as the oldest of them.
const KEPT: usize = 1024;
/// Nobody has waited for a node for so long: it is not asked any more.
const IDLE: Duration = Duration::from_secs(60);

/// Where a server was at some moment after `asked`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    pub(crate) place: Place,
    /// Before the question was sent.
    pub(crate) asked: Instant,
    pub(crate) lsn: Lsn,
}

#[derive(Default)]
pub(crate) struct Positions {
    primary: Arc<Node>,
    standbys: Mutex<HashMap<NodeName, Arc<Node>>>,
    /// Sessions that may want to read elsewhere: without them nobody samples.
    readers: AtomicU32,
}

/// What is known of one node's position, and who waits for more.
struct Node {
    samples: Mutex<VecDeque<Sample>>,
    taken: watch::Sender<u64>,
    wanted: Notify,
    written: Notify,
    is_asked: Mutex<bool>,
}

impl Default for Node {
    fn default() -> Node {
        Node {
            samples: Mutex::default(),
            taken: watch::Sender::new(0),
            wanted: Notify::new(),
            written: Notify::new(),
            is_asked: Mutex::new(false),
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Node {
    /// Keeps the newest `most`.
    fn take(&self, sample: Sample, most: usize) {
        let mut samples = locked(&self.samples);
        if samples.len() >= most {
            samples.pop_front();
        }
        samples.push_back(sample);
        drop(samples);
        self.taken.send_modify(|number| *number += 1);
    }

    /// The first one that was asked for at `since` or later.
    ///
    /// It may be of a primary that has been replaced since. What was committed before it is in the history of the next one at
    /// the same position, and a standby that has replayed past that, on whatever timeline, has replayed it.
    fn since(&self, since: Instant) -> Option<Lsn> {
        let samples = locked(&self.samples);
        let first = samples.partition_point(|sample| sample.asked < since);
        samples.get(first).map(|sample| sample.lsn)
    }

    fn newest(&self) -> Option<Sample> {
        locked(&self.samples).back().cloned()
    }
}

impl Positions {
    /// Somebody may have written just now.
    pub(crate) fn written(&self) {
        if self.readers.load(Ordering::Relaxed) > 0 {
            self.primary.written.notify_one();
        }
    }

    /// Where a standby has to be so that it shows all that was written before `since`; `None`: that was not known in time.
    pub(crate) async fn needed(
        &self,
        since: Instant,
        until: tokio::time::Instant,
        world: &Arc<World>,
    ) -> Option<Lsn> {
        let look = || self.primary.since(since);
        if let Some(lsn) = look() {
            return Some(lsn);
        }
        self.primary.ask(&Role::Primary, world);
        let waiting = async {
            let mut taken = self.primary.taken.subscribe();
            loop {
                if let Some(lsn) = look() {
                    return lsn;
                }
                self.primary.wanted.notify_one();
                // The sender lives as long as this.
                let _next = taken.changed().await;
            }
        };
        timeout_at(until, waiting).await.ok()
    }

    /// Which of these standbys is the first that is known to have replayed `needed`.
    pub(crate) async fn reached(
        &self,
        standbys: &[NodeName],
        needed: Lsn,
        until: tokio::time::Instant,
        world: &Arc<World>,
    ) -> Option<usize> {
        let nodes: Vec<Arc<Node>> = standbys.iter().map(|name| self.standby(name)).collect();
        let look = || {
            standbys.iter().zip(&nodes).position(|(name, node)| {
                node.newest().is_some_and(|sample| sample.lsn >= needed && is_there(name, &sample, world))
            })
        };
        if let Some(at) = look() {
            return Some(at);
        }
        let mut taken: Vec<_> = nodes.iter().map(|node| node.taken.subscribe()).collect();
        for (name, node) in standbys.iter().zip(&nodes) {
            node.ask(&Role::Standby(name.clone()), world);
        }
        let waiting = async {
            loop {
                if let Some(at) = look() {
                    return at;
                }
                nodes.iter().for_each(|node| node.wanted.notify_one());
                let any = taken.iter_mut().map(|taken| Box::pin(taken.changed()));
                any_of(any.collect()).await;
            }
        };
        timeout_at(until, waiting).await.ok()
    }

    /// Does the server at the other end of a connection that was opened at `opened` show all up to `needed`?
    pub(crate) async fn shows(
        &self,
        standby: &NodeName,
        needed: Lsn,
        opened: Instant,
        until: tokio::time::Instant,
        world: &Arc<World>,
    ) -> bool {
        let node = self.standby(standby);
        let look = || {
            let sample = node.newest()?;
            (sample.asked >= opened && sample.lsn >= needed && is_there(standby, &sample, world))
                .then_some(())
        };
        if look().is_some() {
            return true;
        }
        let mut taken = node.taken.subscribe();
        node.ask(&Role::Standby(standby.clone()), world);
        let waiting = async {
            while look().is_none() {
                node.wanted.notify_one();
                let _next = taken.changed().await;
            }
        };
        timeout_at(until, waiting).await.is_ok()
    }

    fn standby(&self, name: &NodeName) -> Arc<Node> {
        Arc::clone(locked(&self.standbys).entry(name.clone()).or_default())
    }

    /// As long as it lives somebody may want to read elsewhere.
    pub(crate) fn reader(world: &Arc<World>) -> Reader {
        world.positions.readers.fetch_add(1, Ordering::Relaxed);
        Reader(Arc::clone(world))
    }
}

/// Is it of the place where this standby is now?
fn is_there(name: &NodeName, sample: &Sample, world: &World) -> bool {
    matches!(world.fence.place(&Role::Standby(name.clone())), Route::To(place, _) if place == sample.place)
}

async fn any_of<F: Future + Unpin>(mut futures: Vec<F>) {
    std::future::poll_fn(|cx| {
        match futures.iter_mut().any(|future| std::pin::Pin::new(future).poll(cx).is_ready()) {
            true => std::task::Poll::Ready(()),
            false => std::task::Poll::Pending,
        }
    })
    .await;
}

pub(crate) struct Reader(Arc<World>);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.positions.readers.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Node {
    /// Sees to it that somebody takes samples of this node.
    fn ask(self: &Arc<Node>, role: &Role, world: &Arc<World>) {
        if std::mem::replace(&mut *locked(&self.is_asked), true) {
            return;
        }
        let (node, role, here) = (Arc::clone(self), role.clone(), Arc::clone(world));
        world.spawn_at(Worker(0), async move { node.sample(&role, &here).await });
    }

    /// Until nobody has wanted any for a while.
    async fn sample(&self, role: &Role, world: &Arc<World>) {
        let most = if *role == Role::Primary { KEPT } else { 1 };
        let mut connection = None;
        loop {
            let wanted = async {
                tokio::select! {
                    () = self.wanted.notified() => {}
                    () = self.written.notified() => {
                        tokio::select! {
                            () = self.wanted.notified() => {}
                            () = sleep(AFTER_WRITE) => {}
                        }
                    }
                }
            };
            if timeout(IDLE, wanted).await.is_err() {
                // Whoever comes from now on begins anew; one that came in this moment asks again when it has waited.
                *locked(&self.is_asked) = false;
                return;
            }
            match take(&mut connection, role, world).await {
                Ok(sample) => {
                    self.take(sample, most);
                    sleep(BETWEEN).await;
                }
                Err(error) => {
                    tracing::debug!(%error, ?role, "a position cannot be asked for");
                    connection = None;
                    sleep(AGAIN_AFTER).await;
                }
            }
        }
    }
}

async fn take(connection: &mut Option<Backend>, role: &Role, world: &Arc<World>) -> Result<Sample, NotIn> {
    let Route::To(place, target) = world.fence.place(role) else {
        return Err(NotIn::Unreachable("there is no route".to_owned()));
    };
    let mut backend = own::connect(connection.take(), place.clone(), target, world).await?;
    let asked = clock::now();
    // What is written and not flushed yet counts, too: a commit that was not waited for is among it.
    let query: &[u8] = match role {
        Role::Primary => b"SELECT pg_current_wal_insert_lsn()::text LIMIT $1::int8",
        Role::Standby(_) => b"SELECT pg_last_wal_replay_lsn()::text LIMIT $1::int8",
    };
    let rows = backend.values(query, &[None], ANSWER_WITHIN).await?;
    let text = rows.into_iter().next().flatten().and_then(|text| String::from_utf8(text).ok());
    let lsn = text.as_deref().and_then(|text| text.parse::<Lsn>().ok());
    let lsn = lsn.ok_or_else(|| NotIn::Unreachable("it has no position".to_owned()))?;
    let lsn = if *role == Role::Primary { end_of_records(lsn) } else { lsn };
    *connection = Some(backend);
    Ok(Sample { place, asked, lsn })
}

const PAGE_BYTES: u64 = 8192;
const PAGE_HEADER_BYTES: u64 = 24;

/// An insert position behind nothing but the header of its page: no record ends there, so none is ever replayed up to there
/// before the next one is written. What is behind the end of the page before it is the same.
fn end_of_records(lsn: Lsn) -> Lsn {
    if lsn.0 % PAGE_BYTES == PAGE_HEADER_BYTES { Lsn(lsn.0 - PAGE_HEADER_BYTES) } else { lsn }
}

/// When clients may have written last.
#[derive(Debug)]
pub(crate) struct Marks {
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    by_client: HashMap<Who, Arc<Mark>>,
    /// So many are known before those that are gone are forgotten.
    most: usize,
    /// Whoever is not known may have written up to then.
    floor: Instant,
}

/// Who is taken for the same client: connections of one user from one address to one database.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Who {
    pub(crate) database: String,
    pub(crate) user: String,
    pub(crate) address: IpAddr,
}

#[derive(Debug)]
pub(crate) struct Mark {
    /// When it may have written last, on this machine's clock.
    wrote_ns: AtomicU64,
    /// How many of its sessions may be writing.
    writing: AtomicU32,
}

/// So many clients are known at least. Then those that are gone are forgotten, which costs those that come back nothing
/// but a standby that has come as far as others have meanwhile.
const LEAST_KNOWN: usize = 10_000;

impl Marks {
    /// What was written before this proxy began it does not know.
    pub(crate) fn new(now: Instant) -> Marks {
        Marks { known: Mutex::new(Known { by_client: HashMap::new(), most: LEAST_KNOWN, floor: now }) }
    }

    pub(crate) fn of(&self, who: Who) -> Arc<Mark> {
        let mut known = locked(&self.known);
        if known.by_client.len() >= known.most && !known.by_client.contains_key(&who) {
            known.forget_the_gone();
        }
        let floor = known.floor;
        Arc::clone(known.by_client.entry(who).or_insert_with(|| {
            let wrote_ns = AtomicU64::new(nanoseconds(floor));
            Arc::new(Mark { wrote_ns, writing: AtomicU32::new(0) })
        }))
    }
}

impl Known {
    fn forget_the_gone(&mut self) {
        let mut floor = self.floor;
        self.by_client.retain(|_, mark| {
            let stays = Arc::strong_count(mark) > 1;
            if !stays {
                floor = floor.max(mark.wrote());
            }
            stays
        });
        self.floor = floor;
        self.most = LEAST_KNOWN.max(self.by_client.len() * 2);
    }
}

impl Mark {
    /// When this client may have written last; now, if it may be writing.
    pub(crate) fn last(&self) -> Instant {
        if self.writing.load(Ordering::Acquire) > 0 { clock::now() } else { self.wrote() }
    }

    fn wrote(&self) -> Instant {
        Instant::from_boot(Duration::from_nanos(self.wrote_ns.load(Ordering::Acquire)))
    }

    /// To be held from before something may be written until after the client may have heard of it: another of its
    /// connections may read as soon as it has.
    pub(crate) fn writes(&self) -> Writes<'_> {
        self.writing.fetch_add(1, Ordering::AcqRel);
        Writes(self)
    }
}

fn nanoseconds(at: Instant) -> u64 {
    u64::try_from(at.since_boot().as_nanos()).unwrap_or(u64::MAX)
}

pub(crate) struct Writes<'a>(&'a Mark);

impl Drop for Writes<'_> {
    fn drop(&mut self) {
        self.0.wrote_ns.fetch_max(nanoseconds(clock::now()), Ordering::AcqRel);
        self.0.writing.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use pgherd_core::types::Term;

    use super::*;

    fn at(ms: u64) -> Instant {
        Instant::from_boot(Duration::from_millis(ms))
    }

    fn place(term: u64) -> Place {
        Place { node: "a".parse().unwrap(), term: Term(term) }
    }

    fn who(number: u32) -> Who {
        let address = Ipv4Addr::from(number).into();
        Who { database: "shop".to_owned(), user: "alice".to_owned(), address }
    }

    #[test]
    fn a_write_lies_before_the_first_sample_that_was_asked_for_after_it() {
        let node = Node::default();
        for (asked, lsn) in [(10, 100), (20, 200), (30, 300)] {
            node.take(Sample { place: place(4), asked: at(asked), lsn: Lsn(lsn) }, 3);
        }
        let since = |ms| node.since(at(ms));
        assert_eq!(
            [since(0), since(10), since(11), since(30), since(31)].map(|is| is.map(|lsn| lsn.0)),
            [Some(100), Some(100), Some(200), Some(300), None]
        );
        node.take(Sample { place: place(4), asked: at(40), lsn: Lsn(400) }, 3);
        assert_eq!(since(0), Some(Lsn(200)), "what is older than all is taken for as old as the oldest");
        node.take(Sample { place: place(5), asked: at(50), lsn: Lsn(350) }, 3);
        assert_eq!(
            (since(31), since(41)),
            (Some(Lsn(400)), Some(Lsn(350))),
            "the next primary has what was there"
        );
    }

    #[test]
    fn a_client_writes_until_it_may_have_heard_of_it() {
        let began = clock::now();
        let marks = Marks::new(at(7));
        let mark = marks.of(who(1));
        assert_eq!(mark.last(), at(7), "nobody knows what was before");
        let writes = mark.writes();
        let meanwhile = mark.last();
        assert!(meanwhile >= began);
        drop(writes);
        let after = mark.last();
        assert!(after >= meanwhile);
        assert_eq!((marks.of(who(1)).last(), marks.of(who(2)).last()), (after, at(7)));
    }

    #[test]
    fn who_is_forgotten_has_written_as_late_as_any_of_them() {
        let marks = Marks::new(at(7));
        drop(marks.of(who(0)).writes());
        let (wrote, stays) = (marks.of(who(0)).last(), marks.of(who(1)));
        for number in 2..=LEAST_KNOWN as u32 {
            marks.of(who(number));
        }
        assert_eq!(locked(&marks.known).by_client.len(), 2, "those who are there stay, and the new one");
        assert_eq!((stays.last(), marks.of(who(0)).last()), (at(7), wrote));
    }

    #[test]
    fn a_position_behind_a_pages_header_is_the_end_of_the_page_before() {
        let ends = [(8192 + 24, 8192), (8192 + 25, 8192 + 25), (8192, 8192), (8192 + 40, 8192 + 40)];
        for (lsn, end) in ends {
            assert_eq!(end_of_records(Lsn(lsn)), Lsn(end));
        }
    }
}

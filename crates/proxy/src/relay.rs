//! Moves bytes between a client and its server, and asks the [`Session`] what to do with them.
//!
//! Nothing is kept for a connection that waits: bytes are read into a buffer of the thread, shown to the session, and
//! written at once. Only what the other side does not take yet is kept, and then nothing more is read for it.
//!
//! Nothing is sent to a server, and nothing of it passed on, that the route does not admit at that moment: while nobody knows
//! whether it is still the primary both sides wait. An answer of a host that stood still may be older than what others
//! have acknowledged since.
//!
//! While a primary is drained, a client that has nothing under way is not read from.
//!
//! Leaves out: who gets which server, and what becomes of it afterwards.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use pgherd_pgwire::frame::HEADER_BYTES;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::backend::{Backend, NotDone};
use crate::commit::{self, Check};
use crate::console::aside::Aside;
use crate::counts::Meter;
use crate::fence::{Admission, Verdict};
use crate::net::Stream;
use crate::retry::{MAX_KEPT_BYTES, Retry};
use crate::roster::Card;
use crate::session::{Fault, Pass, Passed, Session};
use crate::trial::{Outcome, Trial};
use crate::watch::{Overdue, Watch};
use crate::world::{Timeouts, World};

/// What is read at once. Large, so that a big result costs few system calls; one for each thread.
const CHUNK_BYTES: usize = 64 * 1024;
/// The longest beginning of a header; whoever leaves more has no room for it now.
const HEADER_LEFT_BYTES: usize = HEADER_BYTES - 1;

/// What was larger for a moment is not kept for the next one.
const KEPT_BYTES: usize = 4 * 1024;

thread_local! {
    static DESK: Cell<Option<Box<Desk>>> = const { Cell::new(None) };
}

/// Where a thread handles bytes: what it takes for a message, all its clients take in turns.
struct Desk {
    chunk: Box<[u8]>,
    /// What is written instead of what came.
    edited: BytesMut,
    /// For the next client of whom something is kept for a moment.
    spare: BytesMut,
}

impl Desk {
    fn with<T>(work: impl FnOnce(&mut Desk) -> T) -> T {
        let mut desk = DESK.take().unwrap_or_else(|| {
            let chunk = vec![0; CHUNK_BYTES].into_boxed_slice();
            Box::new(Desk { chunk, edited: BytesMut::new(), spare: BytesMut::new() })
        });
        let done = work(&mut desk);
        DESK.set(Some(desk));
        done
    }
}

/// Empty, with the room that it has.
fn emptied(mut buffer: BytesMut) -> BytesMut {
    if buffer.capacity() > KEPT_BYTES {
        return BytesMut::new();
    }
    buffer.clear();
    buffer
}

/// How it ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The server owes nothing, and could be somebody else's ([`Session::is_over`]).
    Over,
    /// The client said goodbye, or is gone.
    ClientLeft,
    ServerLost(String),
    /// Somebody has ended the client.
    Dismissed,
    /// The server was told to be the client's no more: it is of a former term.
    Rerouted,
    /// It lasted longer than the operator lets it.
    Overdue(Overdue),
    Fault(Fault),
}

impl End {
    /// What was under way is lost with its server, or must not go on there.
    pub(crate) fn takes_the_server(&self) -> bool {
        matches!(self, End::ServerLost(_) | End::Rerouted)
    }
}

/// What is on its way in both directions. It is the client's, whatever server it has.
#[derive(Default)]
pub(crate) struct Link {
    to_server: Way,
    to_client: Way,
    /// Of what is under way.
    trial: Option<Box<Trial>>,
    retry: Option<Retry>,
    watch: Option<Box<Watch>>,
    meter: Meter,
    /// What is known of the transaction that commits.
    pub(crate) check: Check,
    /// The client's.
    card: Option<Arc<Card>>,
    /// What it asks of the proxy in passing.
    aside: Option<Aside>,
}

impl Link {
    pub(crate) fn of(card: &Arc<Card>) -> Link {
        Link { card: Some(Arc::clone(card)), ..Link::default() }
    }

    /// Of a client that may ask the proxy something in passing.
    pub(crate) fn asking(card: &Arc<Card>, world: &Arc<World>) -> Link {
        Link { aside: Some(Aside::new(world)), ..Link::of(card) }
    }

    /// Answers what the client has asked of the proxy, if it has. Its session has no server.
    pub(crate) fn answer_aside(&mut self, session: &Session) -> Result<bool, Fault> {
        let (Some(aside), Some(status)) = (&mut self.aside, session.lull()) else { return Ok(false) };
        let taken = aside.answer(&self.to_server.unread, status, &mut self.to_client.pending)?;
        self.to_server.unread.advance(taken.unwrap_or(0));
        Ok(taken.is_some())
    }

    fn is_dismissed(&self) -> bool {
        self.card.as_ref().is_some_and(|card| card.is_dismissed())
    }

    /// Something that the client is to hear next.
    pub(crate) fn say(&mut self, write: impl FnOnce(&mut BytesMut)) {
        write(&mut self.to_client.pending);
    }

    /// What the client has not taken yet.
    pub(crate) fn take_unsaid(&mut self) -> BytesMut {
        std::mem::take(&mut self.to_client.pending)
    }

    fn count_moved(&mut self) {
        self.meter.received_bytes += std::mem::take(&mut self.to_server.moved_bytes);
        self.meter.sent_bytes += std::mem::take(&mut self.to_client.moved_bytes);
    }

    /// What the client has sent, and nobody has looked at.
    pub(crate) fn unread(&self) -> &[u8] {
        &self.to_server.unread
    }

    /// Answers what the client has sent, as far as `look` does so and says how much that was.
    pub(crate) fn answer(&mut self, look: impl FnOnce(&[u8], &mut BytesMut) -> Option<usize>) -> bool {
        let Some(bytes) = look(&self.to_server.unread, &mut self.to_client.pending) else { return false };
        self.to_server.unread.advance(bytes);
        true
    }

    /// From now on nothing lasts longer than that.
    pub(crate) fn watch(&mut self, timeouts: Timeouts) {
        self.watch = Watch::new(timeouts).map(Box::new);
    }

    /// As they were set.
    pub(crate) fn timeouts(&self) -> Timeouts {
        self.watch.as_ref().map_or_else(Timeouts::default, |watch| watch.timeouts())
    }

    /// What comes next, and has so many bytes, can be asked of another server as long as the client has heard nothing of it.
    pub(crate) fn try_out(&mut self, bytes: usize) {
        let behind = self.to_server.unread.split_off(bytes);
        self.trial = Some(Box::new(Trial::new(&self.to_server.unread, behind)));
    }

    /// How it went so far, and what the client had asked.
    pub(crate) fn tried(&self) -> Option<(Outcome, &[u8])> {
        self.trial.as_ref().map(|trial| (trial.outcome(), trial.asked()))
    }

    /// It is over.
    pub(crate) fn end_trial(&mut self) {
        if let Some(trial) = self.trial.take() {
            self.to_server.unread.extend_from_slice(&trial.into_asked_and_behind().1);
        }
    }

    /// Another server is to be asked for this, as if the client had just sent it. Of what the former one was sent, and of what
    /// it said, nothing is left.
    pub(crate) fn ask_again(&mut self) {
        if let Some(trial) = self.trial.take() {
            let (mut asked, behind) = trial.into_asked_and_behind();
            asked.extend_from_slice(&behind);
            self.to_server = Way { unread: asked, ..Way::default() };
            self.to_client.unread = BytesMut::new();
        }
    }

    /// What comes next is kept until the client hears of its answer.
    pub(crate) fn keep_first(&mut self) {
        if self.to_server.unread.len() <= MAX_KEPT_BYTES {
            self.retry = Some(Retry::new(&self.to_server.unread));
        }
    }

    /// What the client asked first, if it has heard nothing of its answer.
    pub(crate) fn first(&self) -> Option<&Retry> {
        self.retry.as_ref()
    }

    /// What a server said when it ended the session, if its client has heard nothing since it asked.
    pub(crate) fn take_last_word(&mut self) -> BytesMut {
        self.retry.as_mut().map(Retry::take_last_word).unwrap_or_default()
    }

    pub(crate) fn forget_first(&mut self) {
        self.retry = None;
    }

    /// As [`Link::ask_again`], of what was kept.
    pub(crate) fn ask_first_again(&mut self) {
        if let Some(retry) = self.retry.take() {
            self.to_server = Way { unread: retry.into_asked().into(), ..Way::default() };
            self.to_client.unread = BytesMut::new();
        }
    }

    /// The server is lost, and what its client has asked of it has committed: the client hears that. What it has sent behind it is
    /// still there. `false`: it had asked for more.
    pub(crate) fn tell_committed(&mut self, session: &mut Session) -> bool {
        let tells = session.committed(&mut self.to_client.pending);
        if tells {
            let unread = std::mem::take(&mut self.to_server.unread);
            self.to_server = Way { unread, ..Way::default() };
            self.to_client.unread = BytesMut::new();
        }
        tells
    }

    /// Until the client has sent more than the beginning of a header. `false`: it is gone.
    pub(crate) async fn is_asked(&mut self, client: &mut Stream) -> bool {
        std::future::poll_fn(|cx| {
            if self.is_dismissed() {
                return Poll::Ready(false);
            }
            // What it does not read now it may read later.
            if let Poll::Ready(Err(_)) = self.to_client.drain(cx, client) {
                return Poll::Ready(false);
            }
            self.to_server.clear_away();
            let is_in_a_message = self.aside.as_ref().is_some_and(Aside::is_in_a_message);
            let least = if is_in_a_message { 0 } else { HEADER_LEFT_BYTES };
            while self.to_server.unread.len() <= least {
                match ready!(self.to_server.read(cx, client)) {
                    Ok(count) if count > 0 => {}
                    _ => return Poll::Ready(false),
                }
            }
            Poll::Ready(true)
        })
        .await
    }
}

/// One direction.
#[derive(Default)]
struct Way {
    /// Read, and not taken: the beginning of a header, or all that there was no room for.
    unread: BytesMut,
    /// Passed on, and not taken yet.
    pending: BytesMut,
    must_flush: bool,
    /// Read, and not counted yet.
    moved_bytes: u64,
}

/// Until one side leaves, or the client needs this server no more. `admission` is that of the server.
pub(crate) async fn relay(
    client: &mut Stream,
    server: &mut Backend,
    session: &mut Session,
    admission: &mut Admission,
    link: &mut Link,
) -> End {
    if let Some(watch) = &mut link.watch {
        watch.begin();
    }
    let end = loop {
        let moved = std::future::poll_fn(|cx| {
            // First, so that no change is missed.
            admission.wakes(cx.waker());
            if let Poll::Ready(end) = poll(cx, client, &mut server.stream, session, admission, link) {
                return Poll::Ready(Some(end));
            }
            if link.check.is_due() {
                return Poll::Ready(None);
            }
            match link.watch.as_mut().map(|watch| watch.poll(cx, session)) {
                Some(Poll::Ready(overdue)) => Poll::Ready(Some(End::Overdue(overdue))),
                _ => Poll::Pending,
            }
        });
        match moved.await {
            Some(end) => break end,
            None => {
                if let Err(end) = Box::pin(mark(server, session, link)).await {
                    break end;
                }
            }
        }
    };
    link.count_moved();
    link.meter.finish(session, admission.looked_at(), link.card.as_deref(), admission.card());
    end
}

/// The client is about to commit, and hears nothing of this.
async fn mark(server: &mut Backend, session: &mut Session, link: &mut Link) -> Result<(), End> {
    session.lost_unnamed();
    match commit::mark(server).await {
        Ok(mark) => {
            link.check.marked(mark);
            // What is behind it is another one's.
            session.read_only_one();
            Ok(())
        }
        // The transaction has failed, or nobody knows; with its connection it is rolled back.
        Err(NotDone::Refused { sqlstate, message }) => {
            let why = format!("what commit_check asks for failed: {message} (SQLSTATE {sqlstate})");
            Err(End::ServerLost(why))
        }
        Err(NotDone::Lost(why)) => Err(End::ServerLost(why)),
    }
}

fn poll(
    cx: &mut Context<'_>,
    client: &mut Stream,
    server: &mut Stream,
    session: &mut Session,
    admission: &mut Admission,
    link: &mut Link,
) -> Poll<End> {
    // It wakes this task when it says something. Every second time it is looked at all the same: whoever sends without end is
    // to hear of an error.
    let mut server_is_silent = false;
    loop {
        if link.is_dismissed() {
            return Poll::Ready(End::Dismissed);
        }
        match admission.verdict() {
            Verdict::Admitted => {
                if admission.rest(false) {
                    // Whoever counts those at rest may have counted this one a moment ago.
                    continue;
                }
                session.expect_shutdown(false);
            }
            Verdict::Draining => {
                session.expect_shutdown(true);
                if session.is_idle() && !link.to_server.pending.has_remaining() {
                    admission.rest(true);
                    match from_server(cx, server, client, session, link) {
                        Poll::Ready(Ok(())) => continue,
                        Poll::Ready(Err(end)) => return Poll::Ready(end),
                        Poll::Pending => return Poll::Pending,
                    }
                }
            }
            // The fence wakes this task when that changes.
            Verdict::Unknown => return Poll::Pending,
            Verdict::Superseded => return Poll::Ready(End::Rerouted),
        }
        let answered = !server_is_silent
            && match from_server(cx, server, client, session, link) {
                Poll::Ready(Ok(())) => true,
                // The last word came with the last answer, and nothing is left that it could be about.
                Poll::Ready(Err(End::ServerLost(_))) if session.is_over() && !session.server_has_ended() => {
                    true
                }
                Poll::Ready(Err(end)) => return Poll::Ready(end),
                Poll::Pending => false,
            };
        if answered {
            link.count_moved();
            link.meter.look(session, admission.looked_at(), link.card.as_deref(), admission.card());
        }
        if answered && !session.is_asked() && link.check.answered() {
            session.read_on();
        }
        if session.is_over() {
            return Poll::Ready(End::Over);
        }
        let asked = match from_client(cx, client, server, session, link) {
            Poll::Ready(Ok(())) => true,
            Poll::Ready(Err(end)) => return Poll::Ready(end),
            Poll::Pending => false,
        };
        if asked {
            link.count_moved();
            link.meter.look(session, admission.looked_at(), link.card.as_deref(), admission.card());
        }
        if session.has_left() && !link.to_server.pending.has_remaining() {
            return Poll::Ready(End::ClientLeft);
        }
        // Or it is to be asked something first.
        if !(answered || asked) || link.check.is_due() {
            return Poll::Pending;
        }
        server_is_silent = !(answered || server_is_silent);
    }
}

fn from_server(
    cx: &mut Context<'_>,
    server: &mut Stream,
    client: &mut Stream,
    session: &mut Session,
    link: &mut Link,
) -> Poll<Result<(), End>> {
    let gone = |_: io::Error| End::ClientLeft;
    let Link { to_client: way, trial, retry, .. } = link;
    ready!(way.drain(cx, client)).map_err(gone)?;
    let lost = |error: io::Error| End::ServerLost(error.to_string());
    let show = |chunk: &[u8], edited: &mut BytesMut| match (trial, &mut *retry) {
        (Some(trial), _) => trial
            .show(session, chunk, edited)
            .map(|(as_it_came, taken_bytes)| Shown { as_it_came, taken_bytes }),
        (None, Some(first)) => {
            let (passed, is_heard) = first.show(session, chunk, edited)?;
            retry.take_if(|_| is_heard);
            Ok(passed.into())
        }
        (None, None) => session.from_server(chunk, edited).map(Shown::from),
    };
    match ready!(way.pump(cx, server, client, show)) {
        // What the client says from now on is not for this server: another one is asked, or the client hears the reason.
        Ok(true) if session.server_leaves() => {
            Poll::Ready(Err(End::ServerLost("it has ended the session".to_owned())))
        }
        Ok(true) => Poll::Ready(Ok(())),
        Ok(false) => Poll::Ready(Err(End::ServerLost("it closed the connection".to_owned()))),
        Err(Broken::Read(error)) => Poll::Ready(Err(lost(error))),
        Err(Broken::Write(error)) => Poll::Ready(Err(gone(error))),
        Err(Broken::Fault(fault)) => Poll::Ready(Err(End::Fault(fault))),
    }
}

fn from_client(
    cx: &mut Context<'_>,
    client: &mut Stream,
    server: &mut Stream,
    session: &mut Session,
    link: &mut Link,
) -> Poll<Result<(), End>> {
    let lost = |error: io::Error| End::ServerLost(error.to_string());
    let Link { to_server: way, to_client, aside, retry, check, .. } = link;
    ready!(way.drain(cx, server)).map_err(lost)?;
    let must_end = retry.as_ref().is_some_and(Retry::is_outdated);
    if must_end || !session.has_room() || session.has_left() {
        // Until the server has answered, which wakes this task.
        return Poll::Pending;
    }
    let answers = &mut to_client.pending;
    let show = |chunk: &[u8], edited: &mut BytesMut| {
        if let (Some(aside), Some(status)) = (aside, session.lull())
            && let Some(taken_bytes) = aside.answer(chunk, status, answers)?
        {
            return Ok(Shown { as_it_came: Some(0), taken_bytes });
        }
        if check.must_ask(session, chunk) {
            return Ok(Shown { as_it_came: Some(0), taken_bytes: 0 });
        }
        retry.take_if(|first| !first.sends());
        session.from_client(chunk, edited, answers).map(Shown::from)
    };
    match ready!(way.pump(cx, client, server, show)) {
        Ok(true) => match to_client.drain(cx, client) {
            Poll::Ready(Err(_)) => Poll::Ready(Err(End::ClientLeft)),
            _ => Poll::Ready(Ok(())),
        },
        Ok(false) | Err(Broken::Read(_)) => Poll::Ready(Err(End::ClientLeft)),
        Err(Broken::Write(error)) => Poll::Ready(Err(lost(error))),
        Err(Broken::Fault(fault)) => Poll::Ready(Err(End::Fault(fault))),
    }
}

enum Broken {
    Read(io::Error),
    Write(io::Error),
    Fault(Fault),
}

/// What a session said of a chunk, by positions.
struct Shown {
    /// `None`: what stands in the other buffer.
    as_it_came: Option<usize>,
    taken_bytes: usize,
}

impl From<Passed<'_>> for Shown {
    fn from(passed: Passed<'_>) -> Shown {
        let as_it_came = match passed.pass {
            Pass::AsItCame(bytes) => Some(bytes.len()),
            Pass::Edited => None,
        };
        Shown { as_it_came, taken_bytes: passed.taken_bytes }
    }
}

impl Way {
    /// Gives the other side what it has not taken yet.
    fn drain(&mut self, cx: &mut Context<'_>, to: &mut Stream) -> Poll<io::Result<()>> {
        while self.pending.has_remaining() {
            let count = ready!(Pin::new(&mut *to).poll_write(cx, &self.pending))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.pending.advance(count);
        }
        if self.must_flush {
            ready!(Pin::new(to).poll_flush(cx))?;
            self.must_flush = false;
        }
        if self.pending.capacity() > 0 {
            self.pending = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }

    /// Whoever waits with nothing unread has no room for it.
    fn clear_away(&mut self) {
        if self.unread.is_empty() && self.unread.capacity() > 0 {
            Desk::with(|desk| desk.spare = emptied(std::mem::take(&mut self.unread)));
        }
    }

    /// Reads once and keeps it. 0: the end.
    fn read(&mut self, cx: &mut Context<'_>, from: &mut Stream) -> Poll<io::Result<usize>> {
        Desk::with(|Desk { chunk, spare, .. }| {
            let room = CHUNK_BYTES - self.unread.len();
            let mut buffer = ReadBuf::new(&mut chunk[..room]);
            ready!(Pin::new(from).poll_read(cx, &mut buffer))?;
            let read = buffer.filled();
            if self.unread.capacity() == 0 && !read.is_empty() {
                self.unread = std::mem::take(spare);
            }
            self.unread.extend_from_slice(read);
            self.moved_bytes += read.len() as u64;
            Poll::Ready(Ok(read.len()))
        })
    }

    /// Reads once and passes it on. `false`: the end.
    fn pump(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Stream,
        to: &mut Stream,
        show: impl FnOnce(&[u8], &mut BytesMut) -> Result<Shown, Fault>,
    ) -> Poll<Result<bool, Broken>> {
        Desk::with(|desk| {
            let pumped = self.pump_over(cx, from, to, desk, show);
            desk.edited = emptied(std::mem::take(&mut desk.edited));
            pumped
        })
    }

    fn pump_over(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Stream,
        to: &mut Stream,
        Desk { chunk, edited, spare }: &mut Desk,
        show: impl FnOnce(&[u8], &mut BytesMut) -> Result<Shown, Fault>,
    ) -> Poll<Result<bool, Broken>> {
        let kept = self.unread.len();
        chunk[..kept].copy_from_slice(&self.unread);
        let mut count = 0;
        if kept <= HEADER_LEFT_BYTES {
            let mut buffer = ReadBuf::new(&mut chunk[kept..]);
            ready!(Pin::new(from).poll_read(cx, &mut buffer)).map_err(Broken::Read)?;
            count = buffer.filled().len();
            self.moved_bytes += count as u64;
            if count == 0 {
                return Poll::Ready(Ok(false));
            }
        }
        if self.unread.capacity() > 0 {
            *spare = emptied(std::mem::take(&mut self.unread));
        }
        let received = &chunk[..kept + count];
        let shown = show(received, edited).map_err(Broken::Fault)?;
        match shown.as_it_came {
            Some(length) => {
                self.pass(cx, to, &received[shown.taken_bytes - length..shown.taken_bytes])?;
            }
            None => self.pass(cx, to, edited)?,
        }
        self.unread.extend_from_slice(&received[shown.taken_bytes..]);
        Poll::Ready(Ok(true))
    }

    /// Writes what can be written now and keeps the rest.
    fn pass(&mut self, cx: &mut Context<'_>, to: &mut Stream, mut bytes: &[u8]) -> Result<(), Broken> {
        while !bytes.is_empty() {
            match Pin::new(&mut *to).poll_write(cx, bytes) {
                Poll::Ready(Ok(0)) => return Err(Broken::Write(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(count)) => bytes = &bytes[count..],
                Poll::Ready(Err(error)) => return Err(Broken::Write(error)),
                Poll::Pending => {
                    self.pending.extend_from_slice(bytes);
                    break;
                }
            }
        }
        self.must_flush = to.must_flush();
        if self.must_flush
            && let Poll::Ready(flushed) = Pin::new(to).poll_flush(cx)
        {
            flushed.map_err(Broken::Write)?;
            self.must_flush = false;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use pgherd_core::types::Term;
    use pgherd_pgwire::message::build;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::clock;
    use crate::fence::Fence;
    use crate::pool::Place;
    use crate::routes::{Role, Table, Target};
    use crate::session::{Loan, Mode};
    use crate::statements::Known;

    /// The proxy's end, at which something has come if anything was said, and the other one.
    async fn said(words: &[u8]) -> (Stream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut other = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (own, _) = listener.accept().await.unwrap();
        other.write_all(words).await.unwrap();
        if !words.is_empty() {
            own.readable().await.unwrap();
        }
        (Stream::Tcp(own), other)
    }

    fn admission() -> Admission {
        let (node, term) = ("a".parse().unwrap(), Term(4));
        let place = Place { node, term };
        let fence = Arc::new(Fence::new(Duration::ZERO));
        fence.learn(Table {
            term,
            primary: Some(Target {
                node: place.node.clone(),
                address: Ipv4Addr::LOCALHOST.into(),
                port: 5432,
                socket_dir: None,
            }),
            gate_open: true,
            standbys: Vec::new(),
            forks: Vec::new(),
            draining: None,
            valid_until: clock::now() + Duration::from_secs(60),
        });
        let bell = fence.bell();
        Admission::new(fence, Role::Primary, place, bell, None)
    }

    /// It was lent in the moment in which it ended, or while nobody knew whether it might be used.
    #[tokio::test]
    async fn a_server_that_has_said_its_last_word_is_sent_nothing_more() {
        let mut query = BytesMut::new();
        build::query(&mut query, b"SELECT 1").unwrap();
        for routine in ["ProcessInterrupts", "secure_read"] {
            let fields = format!("SFATAL\0VFATAL\0C57P01\0Mterminating\0R{routine}\0\0");
            let length = u32::try_from(fields.len() + 4).unwrap().to_be_bytes();
            let fatal = [b"E", &length[..], fields.as_bytes()].concat();
            let (mut client, _client) = said(&query).await;
            // It has not closed yet.
            let (server, other) = said(&fatal).await;
            let mut server = crate::backend::tests::backend(server);
            let mut session = Session::sharing(Mode::Transaction, Arc::default());
            session.attach(Loan::new(Known::new(1), 0));
            let mut link = Link::default();
            assert!(link.is_asked(&mut client).await);
            let end = relay(&mut client, &mut server, &mut session, &mut admission(), &mut link).await;
            assert!(matches!(end, End::ServerLost(_)), "{end:?}, {routine}");
            assert!(session.is_untouched(), "another server can do it, and the client hears nothing");
            assert_eq!(link.unread(), &query[..], "what it said is there still");
            assert!(link.take_unsaid().is_empty());
            assert_eq!(other.try_read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
    }

    /// Under load both come at once. Whoever has its answer has lost nothing.
    #[tokio::test]
    async fn a_last_word_behind_the_last_answer_is_not_about_what_was_answered() {
        let mut query = BytesMut::new();
        build::query(&mut query, b"SELECT 1").unwrap();
        let message = |kind: u8, body: &[u8]| {
            let length = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
            [&[kind], &length[..], body].concat()
        };
        let done = message(b'C', b"SELECT 1\0");
        let fatal = message(b'E', b"SFATAL\0VFATAL\0C57P01\0Mterminating\0Rsecure_read\0\0");
        for (status, is_over) in [(b'I', true), (b'T', false)] {
            let (mut client, _client) = said(&query).await;
            let (server, mut other) = said(b"").await;
            let mut server = crate::backend::tests::backend(server);
            let mut session = Session::sharing(Mode::Transaction, Arc::default());
            session.attach(Loan::new(Known::new(1), 0));
            let mut link = Link::default();
            assert!(link.is_asked(&mut client).await);
            let mut admission = admission();
            let relayed = relay(&mut client, &mut server, &mut session, &mut admission, &mut link);
            let answered = async {
                let mut asked = vec![0; query.len()];
                other.read_exact(&mut asked).await.unwrap();
                let answer = [&done[..], &message(b'Z', &[status]), &fatal].concat();
                other.write_all(&answer).await.unwrap();
            };
            let (end, ()) = tokio::join!(relayed, answered);
            assert_eq!(matches!(end, End::Over), is_over, "{end:?}");
            assert!(session.server_leaves(), "it is lent to nobody");
        }
    }
}

//! The Unix socket of a server on this host.
//!
//! Whenever the other side of such a socket reads, it can be written to again, and whoever waits for that is woken: once for each
//! question, and for nothing. So that is waited for only where a write has found no room. (TCP wakes nobody else for it.)
//!
//! Hazard: one task at a time reads and writes it, as it does with every server; a change of what is waited for wakes that one.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

pub(crate) struct Local {
    /// Nothing if what is waited for could not be changed.
    socket: Option<AsyncFd<UnixStream>>,
    waits_for_room: bool,
}

impl Local {
    pub(crate) fn new(stream: tokio::net::UnixStream) -> io::Result<Local> {
        let socket = registered(stream.into_std()?, Interest::READABLE)?;
        Ok(Local { socket: Some(socket), waits_for_room: false })
    }

    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(|socket| socket.get_ref().as_fd())
    }

    fn socket(&self) -> io::Result<&AsyncFd<UnixStream>> {
        self.socket.as_ref().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// From now on.
    fn wait_for_room(&mut self, cx: &Context<'_>) -> io::Result<()> {
        if let Some(socket) = self.socket.take() {
            self.socket = Some(registered(socket.into_inner(), Interest::READABLE | Interest::WRITABLE)?);
            self.waits_for_room = true;
            // Who waits for something to read waits for it anew.
            cx.waker().wake_by_ref();
        }
        Ok(())
    }
}

fn registered(socket: UnixStream, interest: Interest) -> io::Result<AsyncFd<UnixStream>> {
    #[allow(unsafe_code, reason = "the safe constructor is deprecated")]
    // SAFETY: a UnixStream names one open descriptor until it is dropped, and it is dropped with the AsyncFd.
    let registered = unsafe { AsyncFd::register_with_interest(socket, interest) };
    Ok(registered?)
}

impl AsyncRead for Local {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let socket = self.socket()?;
        loop {
            let mut ready = ready!(socket.poll_read_ready(cx))?;
            let room = buf.initialize_unfilled();
            match socket.get_ref().read(room) {
                Ok(count) => {
                    // There was no more.
                    if (1..room.len()).contains(&count) {
                        ready.clear_ready();
                    }
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Local {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let socket = self.socket()?;
            let has_room = match self.waits_for_room {
                true => Some(ready!(socket.poll_write_ready(cx))?),
                false => None,
            };
            match (socket.get_ref().write(bytes), has_room) {
                (Err(error), Some(mut has_room)) if error.kind() == io::ErrorKind::WouldBlock => {
                    has_room.clear_ready();
                }
                (Err(error), None) if error.kind() == io::ErrorKind::WouldBlock => self.wait_for_room(cx)?,
                (Err(error), _) if error.kind() == io::ErrorKind::Interrupted => {}
                (written, _) => return Poll::Ready(written),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.socket()?.get_ref().shutdown(std::net::Shutdown::Write))
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    fn pair() -> (Local, tokio::net::UnixStream) {
        let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
        (Local::new(ours).unwrap(), theirs)
    }

    /// How often a thread goes to sleep between a question and its answer.
    fn rests<T: AsyncRead + AsyncWrite + Unpin>(make: impl FnOnce(tokio::net::UnixStream) -> T) -> u64 {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let other = std::thread::spawn(move || {
            for _ in 0..2 {
                // sleep: whoever asked rests by then, and is seen to be woken by what follows.
                std::thread::sleep(Duration::from_millis(20));
                theirs.read_exact(&mut [0; 8]).unwrap();
                // sleep: so is he, or not, by that it was read.
                std::thread::sleep(Duration::from_millis(20));
                theirs.write_all(b"answer").unwrap();
            }
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        let rests = runtime.block_on(async {
            ours.set_nonblocking(true).unwrap();
            let mut ours = make(tokio::net::UnixStream::from_std(ours).unwrap());
            let metrics = tokio::runtime::Handle::current().metrics();
            let mut before = 0;
            // What is told of at the beginning comes with the first one.
            for _ in 0..2 {
                before = metrics.worker_park_count(0);
                ours.write_all(b"question").await.unwrap();
                ours.read_exact(&mut [0; 6]).await.unwrap();
            }
            metrics.worker_park_count(0) - before
        });
        other.join().unwrap();
        rests
    }

    #[test]
    fn nobody_is_woken_because_the_other_side_reads() {
        assert_eq!(rests(|stream| Local::new(stream).unwrap()), 1);
        assert_eq!(rests(|stream| stream), 2, "if it were not for this");
    }

    #[tokio::test]
    async fn whatever_is_written_is_read_also_where_there_is_no_room_for_it() {
        let (mut ours, theirs) = pair();
        let (mut from, mut to) = theirs.into_split();
        let sent: Vec<u8> = (0..8_000_000_u32).map(|n| n as u8).collect();
        let expected = sent.clone();
        let echo = tokio::spawn(async move {
            // Nothing is read for a while, and then all of it; something is said before and behind.
            to.write_all(b"before").await.unwrap();
            let mut got = vec![0; 8_000_000];
            from.read_exact(&mut got).await.unwrap();
            to.write_all(b"behind").await.unwrap();
            (got, to)
        });
        let mut said = [0; 6];
        ours.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"before");
        assert!(!ours.waits_for_room);
        ours.write_all(&sent).await.unwrap();
        assert!(ours.waits_for_room);
        ours.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"behind");
        let (got, to) = echo.await.unwrap();
        assert!(got == expected);
        drop(to);
        assert_eq!(ours.read(&mut said).await.unwrap(), 0, "the end is seen");
    }

    #[tokio::test]
    async fn who_waits_to_read_goes_on_when_it_is_told_of_room_too() {
        let (mut ours, mut theirs) = pair();
        let sent = vec![b'x'; 4_000_000];
        let (mut written, mut answer) = (0, [0; 2]);
        let both = poll_fn(|cx| {
            // As a relay does: reads first, which finds nothing, and then writes, which finds no room.
            let mut buf = ReadBuf::new(&mut answer);
            if Pin::new(&mut ours).poll_read(cx, &mut buf)?.is_ready() {
                return Poll::Ready(Ok::<_, io::Error>(()));
            }
            while written < sent.len() {
                match Pin::new(&mut ours).poll_write(cx, &sent[written..])? {
                    Poll::Ready(count) => written += count,
                    Poll::Pending => break,
                }
            }
            Poll::Pending
        });
        // Polled behind it: the answer comes while the question is not even read.
        let other = async { theirs.write_all(b"no").await.unwrap() };
        let joined = tokio::time::timeout(SOON, async { tokio::join!(both, other) }).await;
        joined.expect("in time").0.unwrap();
        assert!(ours.waits_for_room);
        assert_eq!(&answer, b"no");
    }
}

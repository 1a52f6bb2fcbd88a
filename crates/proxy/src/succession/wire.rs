//! What two processes of one proxy say to each other, and how.
//!
//! A word is a line of text, one in each packet of a sequenced-packet socket, so that none arrives in parts; a listener
//! comes along with the word that names it. People can read it with `strace`.
//!
//! Compatibility: the two are of different versions whenever this matters most. `hello` carries the version of everything
//! that follows it. `status` and `cancel`, and their answers, have none and never change: a process that is about to leave
//! must understand them from whatever comes after it.
//!
//! Leaves out who says what when ([`super`]). Hazard: a descriptor that is leaked keeps a port taken that nobody accepts at.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg, sockopt,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::proxy::Access;

/// Of what follows `hello`.
pub(super) const VERSION: u32 = 1;
/// The longest word is a refusal with its reason.
const MAX_PACKET_BYTES: usize = 1024;
/// PostgreSQL's longest key, and this proxy's are shorter.
const MAX_KEY_BYTES: usize = 256;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// Of whoever wants to succeed.
    Hello {
        version: u32,
    },
    /// With it comes a socket that listens.
    Listener {
        access: Access,
        address: SocketAddr,
    },
    /// With it comes a descriptor that the proxy itself knows nothing of.
    Other {
        name: String,
    },
    /// That was everything.
    All,
    /// The successor could accept at once.
    Ready,
    /// Nobody accepts now but the successor.
    Yours,
    /// It does. So long the clients of the former one may stay; without a time, as long as they like.
    Serving {
        clients_within: Option<Duration>,
    },
    /// The successor ends because it was asked to, or has a successor itself: nobody is to accept again in its place.
    Goodbye,
    Status,
    State {
        accepts: bool,
        clients: u64,
    },
    Cancel {
        pid: u32,
        key: Vec<u8>,
    },
    /// It was a key of this process, and is done.
    Known,
    Unknown,
    Refused {
        why: String,
    },
}

impl Word {
    pub(super) fn write(&self) -> String {
        match self {
            Word::Hello { version } => format!("hello {version}"),
            Word::Listener { access: Access::ReadWrite, address } => format!("listener read-write {address}"),
            Word::Listener { access: Access::ReadOnly, address } => format!("listener read-only {address}"),
            Word::Other { name } => format!("other {name}"),
            Word::All => "all".to_owned(),
            Word::Ready => "ready".to_owned(),
            Word::Yours => "yours".to_owned(),
            Word::Serving { clients_within: None } => "serving".to_owned(),
            Word::Serving { clients_within: Some(within) } => format!("serving {}", within.as_millis()),
            Word::Goodbye => "goodbye".to_owned(),
            Word::Status => "status".to_owned(),
            Word::State { accepts, clients } => {
                format!("state {} {clients}", if *accepts { "accepts" } else { "retired" })
            }
            Word::Cancel { pid, key } => {
                let key: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
                format!("cancel {pid} {key}")
            }
            Word::Known => "known".to_owned(),
            Word::Unknown => "unknown".to_owned(),
            Word::Refused { why } => format!("refused {why}"),
        }
    }

    pub(super) fn read(text: &str) -> Option<Word> {
        let (verb, rest) = text.split_once(' ').unwrap_or((text, ""));
        let two = || rest.split_once(' ');
        Some(match verb {
            "hello" => Word::Hello { version: rest.parse().ok()? },
            "listener" => {
                let (access, address) = two()?;
                let access = match access {
                    "read-write" => Access::ReadWrite,
                    "read-only" => Access::ReadOnly,
                    _ => return None,
                };
                Word::Listener { access, address: address.parse().ok()? }
            }
            "other" => Word::Other { name: rest.to_owned() },
            "all" => Word::All,
            "ready" => Word::Ready,
            "yours" => Word::Yours,
            "serving" if rest.is_empty() => Word::Serving { clients_within: None },
            "serving" => Word::Serving { clients_within: Some(Duration::from_millis(rest.parse().ok()?)) },
            "goodbye" => Word::Goodbye,
            "status" => Word::Status,
            "state" => {
                let (accepts, clients) = two()?;
                let accepts = match accepts {
                    "accepts" => true,
                    "retired" => false,
                    _ => return None,
                };
                Word::State { accepts, clients: clients.parse().ok()? }
            }
            "cancel" => {
                let (pid, key) = two()?;
                Word::Cancel { pid: pid.parse().ok()?, key: unhex(key)? }
            }
            "known" => Word::Known,
            "unknown" => Word::Unknown,
            "refused" => Word::Refused { why: rest.to_owned() },
            _ => return None,
        })
    }
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || text.len() > 2 * MAX_KEY_BYTES {
        return None;
    }
    let digit = |letter: u8| char::from(letter).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    text.as_bytes().chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

/// The other process, as the kernel knows it: nobody can say to be another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Peer {
    pub(super) pid: i32,
    pub(super) uid: u32,
}

/// One conversation. Ends when it is dropped, also by the death of a process.
#[derive(Debug)]
pub(super) struct Link(UnixStream);

impl From<UnixStream> for Link {
    fn from(stream: UnixStream) -> Link {
        Link(stream)
    }
}

impl Link {
    /// The socket is one of sequenced packets, and does not block.
    pub(super) fn new(socket: OwnedFd) -> io::Result<Link> {
        Ok(Link(UnixStream::from_std(socket.into())?))
    }

    pub(super) fn peer(&self) -> io::Result<Peer> {
        let found = sockopt::socket_peercred(&self.0)?;
        Ok(Peer { pid: found.pid.as_raw_nonzero().get(), uid: found.uid.as_raw() })
    }

    pub(super) async fn send(&self, word: &Word) -> io::Result<()> {
        self.send_with(word, None).await
    }

    pub(super) async fn send_with(&self, word: &Word, along: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let text = word.write();
        // Only a reason can be longer, and its end is not what matters.
        let packet = &text.as_bytes()[..text.len().min(MAX_PACKET_BYTES)];
        let carried = along.map(|fd| [fd]);
        self.0
            .async_io(Interest::WRITABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                if let Some(fds) = &carried
                    && !ancillary.push(SendAncillaryMessage::ScmRights(fds))
                {
                    return Err(io::Error::other("no room for a descriptor beside a word"));
                }
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                sendmsg(&self.0, &[IoSlice::new(packet)], &mut ancillary, flags)?;
                Ok(())
            })
            .await
    }

    /// The next word, and what came along; `None` when the other process has ended, or has hung up.
    pub(super) async fn receive(&self) -> io::Result<Option<(Word, Option<OwnedFd>)>> {
        let received = self.0.async_io(Interest::READABLE, || receive(self.0.as_fd())).await;
        match received {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            other => other,
        }
    }
}

fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<(Word, Option<OwnedFd>)>> {
    let mut buffer = [0; MAX_PACKET_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = recvmsg(socket, &mut [IoSliceMut::new(&mut buffer)], &mut ancillary, flags)?;
    let along = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    if message.bytes == 0 {
        return Ok(None);
    }
    let misunderstood = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    if message.flags.contains(ReturnFlags::TRUNC) {
        return Err(misunderstood("a word that is too long"));
    }
    // A reason may have been cut in the middle of a letter.
    let text = String::from_utf8_lossy(&buffer[..message.bytes]);
    let word = Word::read(&text).ok_or_else(|| misunderstood("a word that nobody knows"))?;
    Ok(Some((word, along)))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use proptest::prelude::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (Link, Link) {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        (Link::new(one).unwrap(), Link::new(other).unwrap())
    }

    fn words() -> Vec<Word> {
        vec![
            Word::Hello { version: 7 },
            Word::Listener { access: Access::ReadWrite, address: "127.0.0.1:9999".parse().unwrap() },
            Word::Listener { access: Access::ReadOnly, address: "[2001:db8::1]:9998".parse().unwrap() },
            Word::Other { name: "metrics".to_owned() },
            Word::All,
            Word::Ready,
            Word::Yours,
            Word::Serving { clients_within: None },
            Word::Serving { clients_within: Some(Duration::from_secs(3600)) },
            Word::Goodbye,
            Word::Status,
            Word::State { accepts: true, clients: 0 },
            Word::State { accepts: false, clients: 17 },
            Word::Cancel { pid: u32::MAX, key: vec![0, 1, 254, 255] },
            Word::Known,
            Word::Unknown,
            Word::Refused { why: "it is Tuesday".to_owned() },
        ]
    }

    #[test]
    fn words_read_back() {
        for word in words() {
            assert_eq!(Word::read(&word.write()), Some(word));
        }
        for wrong in
            ["", "hello", "hello x", "listener both 127.0.0.1:1", "cancel 1 abc", "state gone 1", "what"]
        {
            assert_eq!(Word::read(wrong), None, "{wrong}");
        }
    }

    /// What a process of any other version says to one that leaves.
    #[test]
    fn the_words_without_a_version_are_as_they_were_in_the_first_one() {
        assert_eq!(Word::read("status"), Some(Word::Status));
        assert_eq!(Word::read("cancel 17 00ff"), Some(Word::Cancel { pid: 17, key: vec![0, 255] }));
        assert_eq!(Word::State { accepts: true, clients: 3 }.write(), "state accepts 3");
        assert_eq!(Word::State { accepts: false, clients: 3 }.write(), "state retired 3");
        assert_eq!((Word::Known.write(), Word::Unknown.write()), ("known".to_owned(), "unknown".to_owned()));
    }

    proptest! {
        #[test]
        fn whatever_is_said_is_a_word_or_none(text in ".{0,80}") {
            if let Some(word) = Word::read(&text) {
                prop_assert_eq!(Word::read(&word.write()), Some(word));
            }
        }
    }

    #[tokio::test]
    async fn a_listener_comes_along_and_an_end_is_an_end() {
        let (one, other) = pair();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let word = Word::Listener { access: Access::ReadOnly, address };
        one.send_with(&word, Some(listener.as_fd())).await.unwrap();
        one.send(&Word::All).await.unwrap();
        drop(listener);
        let (heard, along) = other.receive().await.unwrap().unwrap();
        let handed = TcpListener::from(along.unwrap());
        assert_eq!((heard, handed.local_addr().unwrap()), (word, address));
        assert_eq!(other.receive().await.unwrap().unwrap().0, Word::All);
        let own = Peer { pid: std::process::id().cast_signed(), uid: rustix::process::geteuid().as_raw() };
        assert_eq!(other.peer().unwrap(), own);

        one.send(&Word::Refused { why: "ä".repeat(2000) }).await.unwrap();
        assert!(matches!(other.receive().await.unwrap(), Some((Word::Refused { .. }, None))));
        sendmsg(
            &one.0,
            &[IoSlice::new(b"nonsense")],
            &mut SendAncillaryBuffer::new(&mut []),
            SendFlags::empty(),
        )
        .unwrap();
        assert_eq!(other.receive().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(one);
        assert!(other.receive().await.unwrap().is_none());
        assert!(other.send(&Word::Ready).await.is_err(), "nobody hears it");
    }
}

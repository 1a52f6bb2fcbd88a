//! What agent and fence say to each other, and over what.
//!
//! Orders and answers are JSON, one in each packet of a sequenced-packet socket, so that none arrives in
//! parts. The deadline does not travel: it stands in a page of memory, which the agent hands over with its
//! first packet, so that a fence that was stopped for a while reads the newest one and not the oldest of a
//! queue.
//!
//! Compatibility: after an upgrade an agent talks to a fence of the version before. Fields are only added;
//! what a fence does not understand it says ([`Answer::Misunderstood`]), and the agent replaces it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use pgherd_api::peer::Fenced;
use pgherd_core::types::Instant;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Deadline;

pub(super) const FORMAT: u32 = 1;
/// Largest order: a release with its certificate, an authority or two, and an address for each agent.
pub(super) const MAX_PACKET_BYTES: usize = 128 * 1024;

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub(super) enum Order {
    /// The first packet; the deadline's page comes with it.
    TakeOver {
        format: u32,
    },
    Arm(Box<Arm>),
    Disarm,
    Ping,
    /// End, if nothing is armed.
    Retire,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub(super) enum Answer {
    Hello(Hello),
    Armed {
        term: u64,
    },
    /// Not armed; what was armed before still is.
    Refused {
        term: u64,
        why: String,
    },
    Disarmed,
    Pong,
    Misunderstood {
        why: String,
    },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) format: u32,
    pub(super) pid: i32,
    pub(super) armed: Option<u64>,
    /// Whether its memory cannot be paged out.
    pub(super) locked: bool,
}

/// All that a fence needs once its agent is silent.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Arm {
    pub(super) term: u64,
    pub(super) postmaster: i32,
    /// Looked up by the agent: at the deadline the disk may not answer.
    pub(super) directory: Directory,
    /// PostgreSQL's System V shared memory; the kernel counts who holds it.
    pub(super) shm_id: Option<i64>,
    /// No deadline lies further ahead.
    pub(super) grace_ms: u64,
    pub(super) message: Fenced,
    pub(super) targets: Vec<super::Target>,
    /// PEM of those whom to believe that they are the targets.
    pub(super) authorities: String,
}

/// The same directory, whatever path leads there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Directory {
    pub(super) device: u64,
    pub(super) inode: u64,
}

impl Directory {
    pub(super) fn of(metadata: &std::fs::Metadata) -> Directory {
        use std::os::unix::fs::MetadataExt;
        Directory { device: metadata.dev(), inode: metadata.ino() }
    }
}

/// Sends one packet without waiting. A peer that does not read its packets is treated like one that is gone.
pub(super) fn send<T: Serialize>(socket: BorrowedFd<'_>, what: &T, page: Option<&Beats>) -> io::Result<()> {
    let packet = serde_json::to_vec(what).map_err(io::Error::other)?;
    if packet.len() > MAX_PACKET_BYTES {
        return Err(io::Error::other(format!(
            "a packet of {} bytes, the limit is {MAX_PACKET_BYTES}",
            packet.len()
        )));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut along = SendAncillaryBuffer::new(&mut space);
    let descriptor = page.map(|beats| [beats.0.as_fd()]);
    if let Some(descriptor) = &descriptor
        && !along.push(SendAncillaryMessage::ScmRights(descriptor))
    {
        return Err(io::Error::other("no room for a descriptor beside a packet"));
    }
    sendmsg(socket, &[IoSlice::new(&packet)], &mut along, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
    Ok(())
}

/// One packet, as far as it can be understood.
#[derive(Debug)]
pub(super) enum Received<T> {
    Packet(T, Option<Beats>),
    Malformed(String),
    /// The other side is gone.
    End,
}

/// Receives one packet without waiting; `WouldBlock` when there is none.
pub(super) fn receive<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> io::Result<Received<T>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut along = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut along, flags)?;
    let page = along.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next().map(Beats),
        _ => None,
    });
    if message.bytes == 0 {
        return Ok(Received::End);
    }
    if message.flags.contains(ReturnFlags::TRUNC) {
        return Ok(Received::Malformed(format!("a packet of more than {} bytes", buffer.len())));
    }
    Ok(match serde_json::from_slice(&buffer[..message.bytes]) {
        Ok(packet) => Received::Packet(packet, page),
        Err(error) => Received::Malformed(error.to_string()),
    })
}

/// The page in which an agent's main loop leaves its deadline.
#[derive(Debug)]
pub(super) struct Beats(OwnedFd);

impl Beats {
    pub(super) fn create() -> io::Result<Beats> {
        let flags = MemfdFlags::CLOEXEC;
        let made = match memfd_create("pgherd-beats", flags | MemfdFlags::NOEXEC_SEAL) {
            // Kernels before 6.3 do not know the flag, some later ones insist on it.
            Err(rustix::io::Errno::INVAL) => memfd_create("pgherd-beats", flags)?,
            made => made?,
        };
        Ok(Beats(made))
    }

    /// Eight aligned bytes, which a reader sees all or none of.
    pub(super) fn write(&self, deadline: Deadline) -> io::Result<()> {
        let nanos = u64::try_from(deadline.at.since_boot().as_nanos()).unwrap_or(u64::MAX >> 1);
        let word = nanos << 1 | u64::from(deadline.patient);
        rustix::io::pwrite(&self.0, &word.to_ne_bytes(), 0)?;
        Ok(())
    }

    /// `None` before the first turn of the agent's loop.
    pub(super) fn read(&self) -> Option<Deadline> {
        let mut word = [0; 8];
        match rustix::io::pread(&self.0, &mut word, 0) {
            Ok(8) => {}
            _ => return None,
        }
        let word = u64::from_ne_bytes(word);
        let at = Instant::from_boot(Duration::from_nanos(word >> 1));
        Some(Deadline { at, patient: word & 1 == 1 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_holds_the_newest_deadline_for_whoever_it_was_handed_to() {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let pair = || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let (ours, theirs) = pair().unwrap();
        let beats = Beats::create().unwrap();
        assert_eq!(beats.read(), None);
        send(ours.as_fd(), &Order::TakeOver { format: FORMAT }, Some(&beats)).unwrap();
        let mut buffer = vec![0; MAX_PACKET_BYTES];
        let received = receive::<Order>(theirs.as_fd(), &mut buffer).unwrap();
        let Received::Packet(Order::TakeOver { format: FORMAT }, Some(page)) = received else {
            panic!("{received:?}");
        };
        for (nanos, patient) in [(1_234_567_891, true), (7, false), (u64::MAX >> 2, true)] {
            let deadline = Deadline { at: Instant::from_boot(Duration::from_nanos(nanos)), patient };
            beats.write(deadline).unwrap();
            assert_eq!(page.read(), Some(deadline));
        }
        drop(ours);
        assert!(matches!(receive::<Order>(theirs.as_fd(), &mut buffer).unwrap(), Received::End));
    }

    /// Orders of the first version, as an agent of that version sends them.
    #[test]
    fn the_first_version_is_still_understood() {
        let arm = r#"{"order":"arm","term":7,"postmaster":4711,"directory":{"device":1,"inode":2},"shm_id":5,
            "grace_ms":10000,"message":{"herd_id":"4f1c","cluster":"main","member":"a_3","term":7,
            "certificate":"pem","signature":"00"},"targets":[{"node":"b","address":"10.0.0.2:8009"}],
            "authorities":"pem","later":1}"#;
        let Order::Arm(arm) = serde_json::from_str(arm).unwrap() else { panic!() };
        assert_eq!((arm.term, arm.postmaster, arm.targets.len()), (7, 4711, 1));
        for order in [r#"{"order":"take_over","format":1}"#, r#"{"order":"disarm"}"#, r#"{"order":"retire"}"#]
        {
            serde_json::from_str::<Order>(order).unwrap();
        }
        let hello = r#"{"answer":"hello","format":1,"pid":3,"armed":7,"locked":false}"#;
        assert!(matches!(serde_json::from_str(hello).unwrap(), Answer::Hello(Hello { armed: Some(7), .. })));
    }
}

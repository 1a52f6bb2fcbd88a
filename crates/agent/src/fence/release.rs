//! Sending the one message, after everything is gone: `POST /v1/fenced` to every other agent, until one of
//! them has made it known to the store.
//!
//! Each agent has a thread of its own, so that one that hangs, or whose name does not resolve, holds up no
//! other. HTTP is written by hand here: the fence has no runtime, and needs one request and one status.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use pgherd_api::route;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};

use super::Target;

/// An agent that hears of it later learns it from the election.
const GIVE_UP_AFTER: Duration = Duration::from_secs(60);
const CONNECT_WITHIN: Duration = Duration::from_secs(1);
/// For each read and write. The agent answers after the store has, which may be electing itself.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(300);
/// Of an answer, only the first line counts.
const MAX_ANSWER_BYTES: usize = 4096;
const STACK_BYTES: usize = 256 * 1024;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// This agent has told the store.
    Told { node: String },
    /// The herd went on without it: the term had ended.
    TermOver { node: String },
    /// Nobody took it in time.
    NotTold { last: String },
}

enum Attempt {
    Final(Outcome),
    /// This agent will never take it.
    Refused(String),
    Again(String),
}

pub(super) fn send(body: Vec<u8>, targets: &[Target], tls: &Arc<ClientConfig>) -> Outcome {
    let until = Instant::now() + GIVE_UP_AFTER;
    let (results, outcomes) = mpsc::channel();
    let body = Arc::new(body);
    for target in targets {
        let (target, tls, body, results) =
            (target.clone(), Arc::clone(tls), Arc::clone(&body), results.clone());
        let told = std::thread::Builder::new().stack_size(STACK_BYTES).spawn(move || {
            // The receiver is gone as soon as another agent was faster.
            drop(results.send(send_to(&target, &tls, &body, until)));
        });
        drop(told);
    }
    drop(results);
    let mut last = "there is no other agent".to_owned();
    loop {
        match outcomes.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(Outcome::NotTold { last: why }) => last = why,
            Ok(outcome) => return outcome,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                return Outcome::NotTold { last };
            }
        }
    }
}

fn send_to(target: &Target, tls: &Arc<ClientConfig>, body: &[u8], until: Instant) -> Outcome {
    loop {
        let last = match attempt(target, tls, body) {
            Ok(Attempt::Final(outcome)) => return outcome,
            Ok(Attempt::Refused(why)) => return Outcome::NotTold { last: format!("{}: {why}", target.node) },
            Ok(Attempt::Again(why)) => why,
            Err(error) => error.to_string(),
        };
        if Instant::now() + PAUSE >= until {
            return Outcome::NotTold { last: format!("{}: {last}", target.node) };
        }
        std::thread::sleep(PAUSE);
    }
}

fn attempt(target: &Target, tls: &Arc<ClientConfig>, body: &[u8]) -> io::Result<Attempt> {
    let name = ServerName::try_from(target.node.clone()).map_err(io::Error::other)?;
    let mut connected = Err(io::Error::other("the address names no host"));
    for address in target.address.to_socket_addrs()? {
        connected = TcpStream::connect_timeout(&address, CONNECT_WITHIN);
        if connected.is_ok() {
            break;
        }
    }
    let tcp = connected?;
    tcp.set_read_timeout(Some(ANSWER_WITHIN))?;
    tcp.set_write_timeout(Some(ANSWER_WITHIN))?;
    tcp.set_nodelay(true)?;
    let connection = ClientConnection::new(Arc::clone(tls), name).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(connection, tcp);
    let head = format!(
        "{} {} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        route::FENCED.method.as_str(),
        route::FENCED.path,
        target.address,
        body.len(),
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;
    stream.flush()?;
    let mut answer = Vec::new();
    let mut piece = [0; 512];
    while !answer.contains(&b'\n') && answer.len() < MAX_ANSWER_BYTES {
        match stream.read(&mut piece)? {
            0 => break,
            read => answer.extend_from_slice(&piece[..read]),
        }
    }
    let node = target.node.clone();
    Ok(match status(&answer) {
        Some(200..=299) => Attempt::Final(Outcome::Told { node }),
        Some(409) => Attempt::Final(Outcome::TermOver { node }),
        Some(status @ 400..=499) => Attempt::Refused(format!("answered {status}")),
        Some(status) => Attempt::Again(format!("answered {status}")),
        None => Attempt::Again("the answer is not HTTP".to_owned()),
    })
}

/// The number in `HTTP/1.1 200 OK`.
fn status(answer: &[u8]) -> Option<u16> {
    let line = answer.split(|byte| *byte == b'\n').next()?;
    let line = std::str::from_utf8(line).ok()?.trim_end();
    let (version, rest) = line.split_once(' ')?;
    let number = rest.split(' ').next()?;
    (version.starts_with("HTTP/1.") && number.len() == 3).then(|| number.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_of_an_answer() {
        assert_eq!(status(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"), Some(200));
        assert_eq!(status(b"HTTP/1.1 409\r\n"), Some(409));
        for wrong in [&b""[..], b"SSH-2.0-x\r\n", b"HTTP/1.1 2000 x\r\n", b"HTTP/1.1\r\n", b"\xff\xfe"] {
            assert_eq!(status(wrong), None);
        }
    }
}

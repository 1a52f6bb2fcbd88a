//! The supervisor's socket: a second `up` watches through it, and `down` asks it to stop.
//!
//! One line of JSON in, lines of JSON out until the supervisor ends or the other side goes away. The socket
//! lies in a directory of mode 0700: whoever can reach it could as well kill the supervisor.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::LocalError;
use super::board::Board;
use super::event::Event;
use super::home::Home;

/// A request is a few words; whoever sends more is not one of ours.
const MAX_REQUEST_BYTES: u64 = 4096;
/// Somebody who connects and says nothing is let go.
const REQUEST_WITHIN: Duration = Duration::from_secs(5);
/// The supervisor has the lock before it has the socket.
const SOCKET_WITHIN: Duration = Duration::from_secs(10);
/// The first line of an answer: whoever asked knows that somebody is awake at the other end.
const HEARD: &[u8] = b"\n";
/// For watchers to read how it ended.
const LAST_WORDS_WITHIN: Duration = Duration::from_secs(2);
const TRY_AGAIN: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ask {
    /// Only watch.
    Watch,
    /// Stop in order, and watch that.
    Stop,
}

#[derive(Debug, Serialize, Deserialize)]
struct Request {
    ask: Ask,
}

/// Binds the socket. The lock is held, so a file that is there belongs to nobody any more.
pub(super) fn listen(home: &Home) -> Result<UnixListener, LocalError> {
    let path = home.socket();
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(LocalError::io("replace", &path)(error));
        }
        _ => {}
    }
    let listener = UnixListener::bind(&path).map_err(LocalError::io("listen on", &path))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))
        .map_err(LocalError::io("set the mode of", &path))?;
    Ok(listener)
}

/// Answers everybody who comes.
#[derive(Debug)]
pub(super) struct Server {
    accepting: JoinHandle<()>,
    /// Closed when the last connection is.
    connections: mpsc::Receiver<()>,
}

impl Server {
    pub(super) fn start(listener: UnixListener, board: Board) -> Server {
        let (connection, connections) = mpsc::channel(1);
        Server { accepting: tokio::spawn(accept(listener, board, connection)), connections }
    }

    /// Takes nobody new, and lets those who watch read the last event.
    pub(super) async fn finish(mut self) {
        self.accepting.abort();
        // One that does not read is not waited for.
        let _late = tokio::time::timeout(LAST_WORDS_WITHIN, self.connections.recv()).await;
    }
}

async fn accept(listener: UnixListener, board: Board, connection: mpsc::Sender<()>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (board, open) = (board.clone(), connection.clone());
                // A watcher who goes away ends only its own task.
                tokio::spawn(async move {
                    answer(stream, board).await;
                    drop(open);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the supervisor's socket");
                tokio::time::sleep(TRY_AGAIN).await;
            }
        }
    }
}

async fn answer(stream: UnixStream, board: Board) {
    let (from, mut to) = stream.into_split();
    let mut line = String::new();
    let mut from = BufReader::new(from.take(MAX_REQUEST_BYTES));
    let read = tokio::time::timeout(REQUEST_WITHIN, from.read_line(&mut line)).await;
    let request = match read {
        Ok(Ok(_)) => serde_json::from_str::<Request>(&line),
        Ok(Err(_)) | Err(_) => return,
    };
    match request {
        Ok(Request { ask }) => {
            let subscription = board.watch();
            if to.write_all(HEARD).await.is_err() {
                return;
            }
            if ask == Ask::Stop {
                tracing::info!("asked to stop");
                board.stop();
            }
            let _gone = stream_events(subscription, to, from.into_inner().into_inner()).await;
        }
        Err(error) => tracing::warn!(%error, "a request on the supervisor's socket does not read"),
    }
}

/// Ends when the supervisor has nothing more to tell or the other side hangs up.
async fn stream_events(
    mut events: super::board::Subscription,
    mut to: OwnedWriteHalf,
    mut from: OwnedReadHalf,
) -> io::Result<()> {
    let mut nothing = [0_u8; 1];
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            _ = from.read(&mut nothing) => return Ok(()),
        };
        let Some(event) = event else { return Ok(()) };
        let mut line = serde_json::to_vec(&event)?;
        line.push(b'\n');
        to.write_all(&line).await?;
        if event.is_last() {
            return to.shutdown().await;
        }
    }
}

/// A connection to the supervisor of a directory.
#[derive(Debug)]
pub struct Attachment {
    lines: BufReader<OwnedReadHalf>,
    _write: OwnedWriteHalf,
}

/// Connects to the supervisor that holds the lock, waiting for its socket if it has just begun.
pub async fn attach(home: &Home, ask: Ask) -> Result<Attachment, LocalError> {
    attach_within(SOCKET_WITHIN, home, ask).await
}

async fn attach_within(deadline: Duration, home: &Home, ask: Ask) -> Result<Attachment, LocalError> {
    let silent = || LocalError::SupervisorSilent { dir: home.dir().to_owned() };
    let mut request = serde_json::to_vec(&Request { ask }).map_err(|_| silent())?;
    request.push(b'\n');
    let connecting = async {
        loop {
            if let Ok(attachment) = request_on(home, &request).await {
                return attachment;
            }
            tokio::time::sleep(TRY_AGAIN).await;
        }
    };
    tokio::time::timeout(deadline, connecting).await.map_err(|_| silent())
}

/// One that is frozen takes the connection, and never says that it has heard.
async fn request_on(home: &Home, request: &[u8]) -> io::Result<Attachment> {
    let (from, mut to) = UnixStream::connect(home.socket()).await?.into_split();
    to.write_all(request).await?;
    let mut lines = BufReader::new(from);
    match lines.read_line(&mut String::new()).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(Attachment { lines, _write: to }),
    }
}

impl Attachment {
    /// The next event; `None` when the supervisor is gone. What a later version adds is passed over.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            let mut line = String::new();
            match self.lines.read_line(&mut line).await {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
            if let Ok(event) = serde_json::from_str(&line) {
                return Some(event);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home() -> (tempfile::TempDir, Home) {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        home.make(None).unwrap();
        (dir, home)
    }

    #[tokio::test]
    async fn whoever_attaches_sees_the_events_and_can_ask_for_the_stop() {
        let (_dir, home) = home();
        let board = Board::default();
        let server = Server::start(listen(&home).unwrap(), board.clone());
        board.tell(Event::herd("begins"));
        let mut watcher = attach(&home, Ask::Watch).await.unwrap();
        assert_eq!(watcher.next().await, Some(Event::herd("begins")));

        let mut stopper = attach(&home, Ask::Stop).await.unwrap();
        board.asked_to_stop().await;
        board.tell(Event::Stopped);
        server.finish().await;
        assert_eq!(stopper.next().await, Some(Event::herd("begins")));
        for attached in [&mut watcher, &mut stopper] {
            assert_eq!(attached.next().await, Some(Event::Stopped));
            assert_eq!(attached.next().await, None);
        }
    }

    #[tokio::test]
    async fn a_supervisor_that_takes_connections_and_is_silent_is_told_as_such() {
        let (_dir, home) = home();
        let _frozen = listen(&home).unwrap();
        let refused = attach_within(Duration::from_millis(100), &home, Ask::Stop).await;
        assert!(matches!(refused, Err(LocalError::SupervisorSilent { .. })), "{refused:?}");
    }

    #[tokio::test]
    async fn noise_on_the_socket_stops_nothing() {
        let (_dir, home) = home();
        let board = Board::default();
        let server = Server::start(listen(&home).unwrap(), board.clone());
        let mut stream = UnixStream::connect(home.socket()).await.unwrap();
        stream.write_all(b"{\"ask\":\"explode\"}\n").await.unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.unwrap();
        assert!(rest.is_empty());
        assert!(tokio::time::timeout(Duration::from_millis(20), board.asked_to_stop()).await.is_err());
        server.finish().await;
    }

    #[test]
    fn events_read_back_as_they_were_written() {
        let events = [
            Event::step(&"a", "initdb"),
            Event::Trouble { node: None, text: "x".to_owned() },
            Event::Healthy { after_ms: 1 },
            Event::Stopped,
            Event::Failed { message: "x".to_owned(), hint: None },
        ];
        for event in events {
            let line = serde_json::to_string(&event).unwrap();
            assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event, "{line}");
        }
        assert!(serde_json::from_str::<Event>("{\"event\":\"of-a-later-version\"}").is_err());
    }
}

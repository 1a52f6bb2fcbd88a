//! A node's logs, PostgreSQL's and the agent's, read here or passed on from the agent that has them.

use std::path::PathBuf;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use pgherd_api::logs::{LogLine, LogSource, LogsQuery};
use pgherd_api::{Code, Error};
use pgherd_postgres::logs::{self, Position};
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::mpsc;

use super::AgentBackend;
use crate::http::backend::Answer;
use crate::{paths, peers};

const TAIL_DEFAULT: u32 = 100;
const TAIL_MAX: u32 = 10_000;
/// How often a followed log is looked at.
const FOLLOW_EVERY: Duration = Duration::from_millis(300);
/// Lines that wait for a reader; one that is slower makes the reading wait.
const LINES_WAITING: usize = 256;
/// Of the agent's log, how much is looked through for its last lines.
const AGENT_TAIL_BYTES: u64 = 4 << 20;

impl AgentBackend {
    pub(super) async fn read_logs(&self, query: LogsQuery) -> Answer<BoxStream<'static, LogLine>> {
        let own = self.identity.node.as_str();
        match query.node.as_deref() {
            None => {}
            Some(name) if name == own => {}
            Some(name) => return self.logs_of(name, &query).await,
        }
        let tail = query.tail.unwrap_or(TAIL_DEFAULT).min(TAIL_MAX) as usize;
        let (sender, receiver) = mpsc::channel(LINES_WAITING);
        let instance = self.instance.get().cloned();
        let agent_log = paths::agent_log(&self.state_dir);
        let (node, follow) = (own.to_owned(), query.follow);
        tokio::spawn(async move {
            let reader = Reader { node, sender };
            // The reader is gone: nothing is left to do.
            let _: Option<()> = reader.run(instance, agent_log, tail, follow).await;
        });
        let lines = stream::unfold(receiver, |mut receiver| async move {
            let line = receiver.recv().await?;
            Some((line, receiver))
        });
        Ok(lines.boxed())
    }

    async fn logs_of(&self, name: &str, query: &LogsQuery) -> Answer<BoxStream<'static, LogLine>> {
        let (spec, _) = self.stored_spec()?;
        let found = spec.agents().find(|(node, _, _)| node.as_str() == name);
        let (node, host, port) =
            found.ok_or_else(|| Error::new(Code::NodeUnknown, format!("the herd has no node {name}")))?;
        let client = self.peers.client(node, &peers::address(host, port));
        let lines = client.logs(query).await.map_err(|error| error.to_error())?;
        let lines = stream::unfold(lines, |mut lines| async move {
            let line = lines.next().await.ok().flatten()?;
            Some((line, lines))
        });
        Ok(lines.boxed())
    }
}

struct Reader {
    node: String,
    sender: mpsc::Sender<LogLine>,
}

impl Reader {
    /// Ends with `None` as soon as nobody reads any more.
    async fn run(
        &self,
        instance: Option<pgherd_postgres::Instance>,
        agent_log: PathBuf,
        tail: usize,
        follow: bool,
    ) -> Option<()> {
        let mut agent_offset = self.agent_tail(&agent_log, tail).await?;
        let mut position: Option<Position> = None;
        if let Some(instance) = &instance
            && let Ok(Some(piece)) = logs::tail(instance, tail).await
        {
            self.send(LogSource::Postgres, &piece.text).await?;
            position = Some(piece.next);
        }
        if !follow {
            return Some(());
        }
        loop {
            tokio::select! {
                () = self.sender.closed() => return None,
                () = tokio::time::sleep(FOLLOW_EVERY) => {}
            }
            agent_offset = self.agent_since(&agent_log, agent_offset).await?;
            let Some(instance) = &instance else { continue };
            let piece = match position.take() {
                Some(at) => logs::since(instance, at).await.ok(),
                None => logs::tail(instance, tail).await.ok().flatten(),
            };
            if let Some(piece) = piece {
                self.send(LogSource::Postgres, &piece.text).await?;
                position = Some(piece.next);
            }
        }
    }

    async fn send(&self, source: LogSource, text: &str) -> Option<()> {
        for line in text.lines() {
            let line = LogLine { node: self.node.clone(), source, at: time_of(line), text: line.to_owned() };
            self.sender.send(line).await.ok()?;
        }
        Some(())
    }

    async fn agent_tail(&self, path: &PathBuf, tail: usize) -> Option<u64> {
        let Ok(meta) = tokio::fs::metadata(path).await else { return Some(0) };
        let from = meta.len().saturating_sub(AGENT_TAIL_BYTES);
        let text = read_from(path, from).await;
        let lines: Vec<&str> = text.lines().collect();
        let last = lines.get(lines.len().saturating_sub(tail)..).unwrap_or_default().join("\n");
        self.send(LogSource::Agent, &last).await?;
        Some(from + text.len() as u64)
    }

    async fn agent_since(&self, path: &PathBuf, offset: u64) -> Option<u64> {
        let Ok(meta) = tokio::fs::metadata(path).await else { return Some(0) };
        if meta.len() < offset {
            // It was begun anew.
            return Some(0);
        }
        let text = read_from(path, offset).await;
        // An unfinished line is left for the next look.
        let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
        self.send(LogSource::Agent, whole).await?;
        Some(offset + whole.len() as u64)
    }
}

async fn read_from(path: &PathBuf, offset: u64) -> String {
    let read = async {
        let mut file = tokio::fs::File::open(path).await?;
        file.seek(std::io::SeekFrom::Start(offset)).await?;
        let mut bytes = Vec::new();
        file.take(AGENT_TAIL_BYTES).read_to_end(&mut bytes).await?;
        Ok::<_, std::io::Error>(bytes)
    };
    match read.await {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(_) => String::new(),
    }
}

/// The time that a line begins with, where it bears one in RFC 3339 or as PostgreSQL writes it.
fn time_of(line: &str) -> Option<String> {
    let first = line.split_whitespace().next()?;
    if first.parse::<jiff::Timestamp>().is_ok() {
        return Some(first.to_owned());
    }
    let mut words = line.split_whitespace();
    let (date, time, zone) = (words.next()?, words.next()?, words.next()?);
    let zone = if zone == "UTC" || zone == "GMT" { "Z" } else { return None };
    let text = format!("{date}T{time}{zone}");
    text.parse::<jiff::Timestamp>().is_ok().then_some(text)
}

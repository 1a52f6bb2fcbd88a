//! An answer that is a stream of JSON lines: logs, routing tables.

use std::marker::PhantomData;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::de::DeserializeOwned;

use super::CallError;
use super::connection::Lease;

/// Silence for longer, three heartbeats, means that the other end, or the way to it, is gone.
pub(super) const MAX_SILENCE: Duration = Duration::from_secs(15);

/// Longest line that is read.
const MAX_LINE_BYTES: usize = 1 << 20;

/// Dropping it ends the stream and closes its connection.
#[derive(Debug)]
pub struct Lines<T> {
    body: Incoming,
    buffer: BytesMut,
    /// So much of the buffer holds no line end.
    searched: usize,
    peer: String,
    _lease: Lease,
    _line: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Lines<T> {
    pub(super) fn new(lease: Lease, body: Incoming, peer: String) -> Lines<T> {
        Lines { body, buffer: BytesMut::new(), searched: 0, peer, _lease: lease, _line: PhantomData }
    }

    /// The next one; None at the end of the stream.
    pub async fn next(&mut self) -> Result<Option<T>, CallError> {
        loop {
            if let Some(line) = self.take_line() {
                let is_heartbeat = line.is_empty();
                if !is_heartbeat {
                    return serde_json::from_slice(&line).map(Some).map_err(|error| self.protocol(error));
                }
                continue;
            }
            if self.buffer.len() > MAX_LINE_BYTES {
                return Err(self.protocol(format!("a line is longer than {MAX_LINE_BYTES} bytes")));
            }
            let Ok(frame) = tokio::time::timeout(MAX_SILENCE, self.body.frame()).await else {
                let cause = format!("silence for {} s", MAX_SILENCE.as_secs());
                return Err(CallError::Broken { peer: self.peer.clone(), cause });
            };
            match frame {
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(self.protocol("the stream ends within a line")),
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.buffer.extend_from_slice(data);
                    }
                }
                Some(Err(error)) => {
                    return Err(CallError::Broken { peer: self.peer.clone(), cause: error.to_string() });
                }
            }
        }
    }

    fn take_line(&mut self) -> Option<BytesMut> {
        match self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') {
            Some(offset) => {
                let line = self.buffer.split_to(self.searched + offset);
                self.buffer.advance(1);
                self.searched = 0;
                Some(line)
            }
            None => {
                self.searched = self.buffer.len();
                None
            }
        }
    }

    fn protocol(&self, cause: impl std::fmt::Display) -> CallError {
        CallError::Protocol { peer: self.peer.clone(), cause: cause.to_string() }
    }
}

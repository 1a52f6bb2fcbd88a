//! Answers without an end: JSON lines, with an empty one as a sign of life.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::Body;
use axum::http::header::HeaderValue;
use axum::http::{Response, StatusCode};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use pgherd_api::route::HEARTBEAT;
use pgherd_api::{Code, Error};
use serde::Serialize;
use tokio::sync::Semaphore;

use super::answer::{Refusal, respond};

/// Streams under way at a time, of all callers together.
pub(super) const MAX_STREAMS: usize = 256;

pub(super) fn lines<T>(
    items: BoxStream<'static, T>,
    slots: &Arc<Semaphore>,
) -> Result<Response<Body>, Refusal>
where
    T: Serialize + Send + 'static,
{
    let Ok(slot) = Arc::clone(slots).try_acquire_owned() else {
        let message = format!("the agent already serves {MAX_STREAMS} streams");
        return Err(Error::new(Code::Busy, message).into());
    };
    let body = stream::unfold((items, slot), |(mut items, slot)| async move {
        let line = match tokio::time::timeout(HEARTBEAT, items.next()).await {
            Err(_) => Bytes::from_static(b"\n"),
            Ok(None) => return None,
            Ok(Some(item)) => line_of(&item)?,
        };
        Some((Ok::<_, Infallible>(line), (items, slot)))
    });
    let content_type = HeaderValue::from_static("application/x-ndjson");
    Ok(respond(StatusCode::OK, content_type, Body::from_stream(body)))
}

/// JSON has no line ends of its own: those within texts are escaped.
fn line_of(item: &impl Serialize) -> Option<Bytes> {
    match serde_json::to_vec(item) {
        Ok(mut line) => {
            line.push(b'\n');
            Some(line.into())
        }
        Err(error) => {
            tracing::error!("a stream ends, because a line cannot be written as JSON: {error}");
            None
        }
    }
}

//! Reading requests: bodies with a limit and a deadline, JSON with a message that says what is wrong with it.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Body as _;
use pgherd_api::objects::MAX_OBJECTS_BYTES;
use pgherd_api::{Code, Error};
use serde::de::DeserializeOwned;

use super::answer::Refusal;

/// A herd file of a thousand nodes fits several times.
const MAX_REQUEST_BYTES: usize = 1 << 20;

/// From somebody without a certificate.
const MAX_STRANGER_BYTES: usize = 32 << 10;

/// Raft's appends and snapshots.
const MAX_RAFT_BYTES: usize = 64 << 20;

/// For the whole body. A client that sends a byte a second must not hold a connection for ever.
const BODY_DEADLINE: Duration = Duration::from_secs(10);
const RAFT_BODY_DEADLINE: Duration = Duration::from_secs(60);
/// Of an object, as its head says.
const LEAST_BYTES_PER_SECOND: u64 = 1 << 20;

/// A JSON body of a wire type, from a member of the herd.
pub(super) struct JsonBody<T>(pub(super) T);

impl<S: Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = Refusal;
    async fn from_request(request: Request, _: &S) -> Result<JsonBody<T>, Refusal> {
        Ok(JsonBody(read_json(request, MAX_REQUEST_BYTES).await?))
    }
}

/// The same from somebody who is nobody yet.
pub(super) struct StrangerBody<T>(pub(super) T);

impl<S: Sync, T: DeserializeOwned> FromRequest<S> for StrangerBody<T> {
    type Rejection = Refusal;
    async fn from_request(request: Request, _: &S) -> Result<StrangerBody<T>, Refusal> {
        Ok(StrangerBody(read_json(request, MAX_STRANGER_BYTES).await?))
    }
}

async fn read_json<T: DeserializeOwned>(request: Request, limit: usize) -> Result<T, Refusal> {
    check_content_type(request.headers())?;
    let body = read(request.into_body(), limit, BODY_DEADLINE).await?;
    serde_json::from_slice(&body).map_err(|error| Error::of(Code::RequestMalformed).because(error).into())
}

/// A peer's report, in the agents' own format.
pub(super) struct PeerBody(pub(super) Bytes);

impl<S: Sync> FromRequest<S> for PeerBody {
    type Rejection = Refusal;
    async fn from_request(request: Request, _: &S) -> Result<PeerBody, Refusal> {
        check_content_type(request.headers())?;
        Ok(PeerBody(read(request.into_body(), MAX_REQUEST_BYTES, BODY_DEADLINE).await?))
    }
}

/// A request of Raft, in the store's own format.
pub(super) struct RaftBody(pub(super) Bytes);

impl<S: Sync> FromRequest<S> for RaftBody {
    type Rejection = Refusal;
    async fn from_request(request: Request, _: &S) -> Result<RaftBody, Refusal> {
        check_content_type(request.headers())?;
        Ok(RaftBody(read(request.into_body(), MAX_RAFT_BYTES, RAFT_BODY_DEADLINE).await?))
    }
}

/// An object of a repository that this agent keeps, behind what is to become of it.
pub(super) struct ObjectBody(pub(super) Bytes);

impl<S: Sync> FromRequest<S> for ObjectBody {
    type Rejection = Refusal;
    async fn from_request(request: Request, _: &S) -> Result<ObjectBody, Refusal> {
        check_content_type(request.headers())?;
        let body = request.into_body();
        let bytes = body.size_hint().upper().unwrap_or(MAX_OBJECTS_BYTES as u64);
        let deadline = BODY_DEADLINE + Duration::from_secs(bytes / LEAST_BYTES_PER_SECOND);
        Ok(ObjectBody(read(body, MAX_OBJECTS_BYTES, deadline).await?))
    }
}

/// A query string of a wire type.
pub(super) struct QueryOf<T>(pub(super) T);

impl<S: Sync, T: DeserializeOwned> FromRequestParts<S> for QueryOf<T> {
    type Rejection = Refusal;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<QueryOf<T>, Refusal> {
        match Query::try_from_uri(&parts.uri) {
            Ok(Query(value)) => Ok(QueryOf(value)),
            Err(error) => Err(Error::of(Code::RequestMalformed).because(error).into()),
        }
    }
}

/// A form or plain text is what a browser sends across origins without asking first.
fn check_content_type(headers: &HeaderMap) -> Result<(), Refusal> {
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = content_type.split(';').next().unwrap_or_default().trim();
    match essence.eq_ignore_ascii_case("application/json") {
        true => Ok(()),
        false => {
            Err(Error::of(Code::RequestMalformed).because("the content type is not application/json").into())
        }
    }
}

async fn read(body: Body, limit: usize, deadline: Duration) -> Result<Bytes, Refusal> {
    match tokio::time::timeout(deadline, Limited::new(body, limit).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            let message = format!("the request is larger than {limit} bytes");
            Err(Error::new(Code::RequestTooLarge, message).into())
        }
        Ok(Err(error)) => Err(Error::of(Code::RequestMalformed).because(error).into()),
        Err(_) => {
            let message = format!("the request did not arrive within {} s", deadline.as_secs());
            Err(Error::new(Code::DeadlinePassed, message).into())
        }
    }
}

//! The form of answers: JSON, errors with their status, and nothing that a browser or cache would keep.

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use axum::http::{Response, StatusCode};
use axum::response::IntoResponse;
use bytes::Bytes;
use pgherd_api::{Code, Error};
use serde::Serialize;

/// An error as an answer.
#[derive(Debug)]
pub(super) struct Refusal(pub(super) Error);

impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        Refusal(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response<Body> {
        let status = StatusCode::from_u16(self.0.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(code = self.0.code, cause = self.0.cause, "a request failed: {}", self.0.message);
        }
        json(status, &self.0)
    }
}

/// A value of a wire type as an answer.
pub(super) struct Json<T>(pub(super) T);

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response<Body> {
        json(StatusCode::OK, &self.0)
    }
}

/// JSON that somebody else has written, or that begins with it.
pub(super) struct RawJson(pub(super) Bytes);

impl IntoResponse for RawJson {
    fn into_response(self) -> Response<Body> {
        respond(StatusCode::OK, HeaderValue::from_static("application/json"), Body::from(self.0))
    }
}

pub(super) fn json(status: StatusCode, value: &impl Serialize) -> Response<Body> {
    let (status, body) = match serde_json::to_vec(value) {
        Ok(body) => (status, body),
        // Only a wire type with a map of other than text keys could do this.
        Err(error) => {
            tracing::error!("an answer cannot be written as JSON: {error}");
            let error = Error::of(Code::Internal).because(error);
            (StatusCode::INTERNAL_SERVER_ERROR, serde_json::to_vec(&error).unwrap_or_default())
        }
    };
    respond(status, HeaderValue::from_static("application/json"), Body::from(body))
}

pub(super) fn respond(status: StatusCode, content_type: HeaderValue, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, content_type);
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

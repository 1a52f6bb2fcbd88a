//! S3 over HTTP, against a server in this process that answers as S3's documentation says, and fails as asked: 500, 503,
//! 409 with nothing there, 403, bodies that are cut off, an answer that is lost.
//!
//! Signatures are not checked, nor is anything that only a real store does.

use std::collections::BTreeMap;
use std::sync::Mutex;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse, Response};

use super::*;
use crate::store::{Put, Store};

#[derive(Default)]
struct Server {
    objects: Mutex<BTreeMap<String, Bytes>>,
    /// What the next requests are answered with, before they are looked at.
    faults: Mutex<Vec<Fault>>,
}

#[derive(Clone, Copy, PartialEq)]
enum Fault {
    Answer(u16),
    /// The request is carried out, and the answer is another one.
    LoseAnswer,
    /// Half of the body, and then the connection ends.
    CutBody,
}

type Shared = Arc<Server>;

async fn answer(State(server): State<Shared>, request: Request) -> Response {
    let fault = server.faults.lock().unwrap().pop();
    if let Some(Fault::Answer(status)) = fault {
        return error(StatusCode::from_u16(status).unwrap());
    }
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
    let key = parts.uri.path().trim_start_matches("/bucket").trim_start_matches('/').to_owned();
    let response = match parts.method {
        Method::GET if key.is_empty() => list(&server, parts.uri.query().unwrap_or_default()),
        Method::PUT => put(&server, key, &parts.headers, body),
        Method::GET | Method::HEAD => get(&server, &key, &parts.headers, fault),
        Method::DELETE => {
            server.objects.lock().unwrap().remove(&key);
            StatusCode::NO_CONTENT.into_response()
        }
        _ => error(StatusCode::METHOD_NOT_ALLOWED),
    };
    match fault {
        Some(Fault::LoseAnswer) => error(StatusCode::INTERNAL_SERVER_ERROR),
        _ => response,
    }
}

fn error(status: StatusCode) -> Response {
    (status, format!("<Error><Code>{status}</Code><Message>as asked</Message></Error>")).into_response()
}

fn put(server: &Server, key: String, headers: &HeaderMap, body: Bytes) -> Response {
    let mut objects = server.objects.lock().unwrap();
    assert_eq!(headers.get("if-none-match").unwrap(), "*", "every put has its condition");
    if objects.contains_key(&key) {
        return error(StatusCode::PRECONDITION_FAILED);
    }
    objects.insert(key, body);
    [("etag", "\"1\"")].into_response()
}

fn get(server: &Server, key: &str, headers: &HeaderMap, fault: Option<Fault>) -> Response {
    let Some(bytes) = server.objects.lock().unwrap().get(key).cloned() else {
        return error(StatusCode::NOT_FOUND);
    };
    let total = bytes.len();
    let range = headers.get("range").map(|range| {
        let (from, to) = range.to_str().unwrap().trim_start_matches("bytes=").split_once('-').unwrap();
        from.parse::<usize>().unwrap()..to.parse::<usize>().unwrap().saturating_add(1).min(total)
    });
    let status = if range.is_some() { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
    let range = range.unwrap_or(0..total);
    let body = bytes.slice(range.clone());
    let mut response = Response::builder()
        .status(status)
        .header("etag", "\"1\"")
        .header("last-modified", "Fri, 20 Nov 2026 20:54:54 GMT")
        .header("content-length", body.len());
    if status == StatusCode::PARTIAL_CONTENT {
        let last = range.end - 1;
        response = response.header("content-range", format!("bytes {}-{last}/{total}", range.start));
    }
    let body = match fault {
        Some(Fault::CutBody) => {
            let half = body.slice(..body.len() / 2);
            let pieces = [Ok(half), Err(std::io::Error::other("the connection ends"))];
            Body::from_stream(futures_util::stream::iter(pieces))
        }
        _ => Body::from(body),
    };
    response.body(body).unwrap()
}

fn list(server: &Server, query: &str) -> Response {
    let value = |key: &str| {
        let found = query.split('&').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='));
        found.map(|value| value.replace("%2F", "/")).unwrap_or_default()
    };
    let after = value("continuation-token").max(value("start-after"));
    let objects = server.objects.lock().unwrap();
    let all: Vec<_> =
        objects.iter().filter(|(key, _)| key.starts_with(&value("prefix")) && **key > after).collect();
    // Pages of two, so that there are several.
    let page = &all[..all.len().min(2)];
    let contents: String = page
        .iter()
        .map(|(key, bytes)| {
            let (size, time) = (bytes.len(), "2026-11-20T20:54:54.000Z");
            format!("<Contents><Key>{key}</Key><LastModified>{time}</LastModified><Size>{size}</Size><ETag>\"1\"</ETag></Contents>")
        })
        .collect();
    let next = match page.last() {
        Some((key, _)) if all.len() > 2 => format!("<NextContinuationToken>{key}</NextContinuationToken>"),
        _ => String::new(),
    };
    let body = format!("<ListBucketResult>{contents}{next}</ListBucketResult>");
    ([("content-type", "application/xml")], body).into_response()
}

async fn started() -> (Shared, Store) {
    let server = Shared::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let router = Router::new().fallback(answer).with_state(Arc::clone(&server));
    tokio::spawn(async move { axum::serve(listener, router).await });
    let credentials = Credentials {
        access_key: Some("key".to_owned()),
        secret_key: Some("secret".to_owned()),
        endpoint: Some(endpoint),
        allow_http: true,
        ..Credentials::default()
    };
    (server, Store::s3("s3://bucket/some/folder", credentials).unwrap())
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

#[test]
fn s3_keeps_the_contract() {
    crate::testing::run(async {
        let (server, store) = started().await;
        store.probe().await.unwrap();
        assert!(server.objects.lock().unwrap().is_empty(), "the probe leaves nothing");
        store.put(&name("format"), "x".into()).await.unwrap();
        for (name, content) in [("a/1", "one"), ("a/2", "two"), ("a/3", "three"), ("b/1", "four")] {
            assert_eq!(store.put(&name.parse().unwrap(), content.into()).await.unwrap(), Put::Created);
            assert_eq!(store.put(&name.parse().unwrap(), content.into()).await.unwrap(), Put::Same);
            let refused = store.put(&name.parse().unwrap(), "other".into()).await.unwrap_err();
            assert_eq!(refused.failure, Failure::Present, "{refused}");
        }
        assert!(server.objects.lock().unwrap().contains_key("some/folder/a/1"), "below its folder");
        assert_eq!(store.read(&name("a/3"), 10).await.unwrap(), "three");
        assert_eq!(store.read_range(&name("a/3"), 1..4).await.unwrap(), "hre");
        assert_eq!(store.read(&name("a/3"), 4).await.unwrap_err().failure, Failure::TooLarge);
        assert_eq!(store.head(&name("a/3")).await.unwrap().bytes, 5);
        assert!(store.read(&name("a/4"), 10).await.unwrap_err().is_absent());
        let names =
            |listed: &[Listed]| listed.iter().map(|listed| listed.name.to_string()).collect::<Vec<_>>();
        assert_eq!(names(&store.list_all("a/").await.unwrap()), ["a/1", "a/2", "a/3"]);
        let page = store.list("a/", Some(&name("a/1")), 1).await.unwrap();
        assert_eq!((names(&page.objects), page.more), (vec!["a/2".to_owned()], true));
        store.delete(&name("a/3")).await.unwrap();
        store.delete(&name("a/3")).await.unwrap();
        assert!(store.head(&name("a/3")).await.unwrap_err().is_absent());
    });
}

#[test]
fn s3_that_fails_for_a_while_is_asked_again_and_one_that_refuses_says_so() {
    crate::testing::run(async {
        let (server, store) = started().await;
        let next = |faults: &[Fault]| *server.faults.lock().unwrap() = faults.to_vec();
        store.put(&name("format"), "x".into()).await.unwrap();
        next(&[Fault::Answer(503), Fault::Answer(500)]);
        assert_eq!(store.put(&name("a"), "one".into()).await.unwrap(), Put::Created);
        next(&[Fault::Answer(500)]);
        assert_eq!(store.read(&name("a"), 10).await.unwrap(), "one");
        // Tried again inside, the second try finds what the first one wrote.
        next(&[Fault::LoseAnswer]);
        assert_eq!(store.put(&name("b"), "one".into()).await.unwrap(), Put::Same);
        // A competing put is in flight and nothing is there; then it is gone.
        next(&[Fault::Answer(409)]);
        assert_eq!(store.put(&name("c"), "one".into()).await.unwrap(), Put::Created);
        next(&[Fault::Answer(403)]);
        assert_eq!(store.put(&name("d"), "one".into()).await.unwrap_err().failure, Failure::Denied);
        next(&[Fault::Answer(403)]);
        let error = store.read(&name("d"), 10).await.unwrap_err();
        assert_eq!(error.failure, Failure::Denied, "not absent: {error}");
        next(&[Fault::Answer(403)]);
        // The library does not say of a listing why it failed; its message does.
        let error = store.list("a/", None, 10).await.unwrap_err();
        let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        assert!(error.failure.is_unsure() && cause.contains("403"), "{error}: {cause}");
        assert!(store.head(&name("d")).await.unwrap_err().is_absent(), "nothing was written");
        // The bucket is gone: nothing is absent for certain, and nothing was written.
        next(&[Fault::Answer(404), Fault::Answer(404)]);
        let error = store.read(&name("a"), 10).await.unwrap_err();
        assert_eq!(error.failure, Failure::NoRepository, "{error}");
        next(&[Fault::Answer(404)]);
        assert_eq!(store.put(&name("e"), "one".into()).await.unwrap_err().failure, Failure::Failed);
        assert_eq!(server.faults.lock().unwrap().len(), 0, "every fault was met");
    });
}

#[test]
fn a_body_of_s3_that_is_cut_off_is_read_again_and_one_that_always_is_is_an_error() {
    crate::testing::run(async {
        let (server, store) = started().await;
        let content = Bytes::from(crate::testing::Random(1).bytes(100_000));
        store.put(&name("a"), content.clone()).await.unwrap();
        *server.faults.lock().unwrap() = vec![Fault::CutBody];
        assert_eq!(store.read(&name("a"), 1 << 20).await.unwrap(), content);
        assert_eq!(server.faults.lock().unwrap().len(), 0, "the fault was met");
        *server.faults.lock().unwrap() = vec![Fault::CutBody; 1000];
        let error = store.read(&name("a"), 1 << 20).await.unwrap_err();
        assert!(error.failure.is_unsure(), "{error}");
        server.faults.lock().unwrap().clear();
        assert_eq!(store.read(&name("a"), 1 << 20).await.unwrap(), content);
    });
}

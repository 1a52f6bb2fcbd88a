//! S3, Google's and Microsoft's stores over HTTP, against a server in this process that answers as their documentation says, and fails
//! as asked: 500, 503, 409 with nothing there, 403, bodies that are cut off, an answer that is lost.
//!
//! Signatures are not checked, nor is anything that only a real store does.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use aws_lc_rs::encoding::AsDer;
use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use super::*;
use crate::store::{Put, Store, StoreError};

const TIME: &str = "Fri, 20 Nov 2026 20:54:54 GMT";
/// What is in every key, and must be in no message. It is base64.
const SECRET: &str = "c2VjcmV0c2VjcmV0";

/// What is spoken, and by which key.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Dialect {
    S3,
    Gcs,
    Azure,
    AzureBySas,
}

const ALL: [Dialect; 4] = [Dialect::S3, Dialect::Gcs, Dialect::Azure, Dialect::AzureBySas];

impl Dialect {
    fn is_azure(self) -> bool {
        matches!(self, Dialect::Azure | Dialect::AzureBySas)
    }
}

struct Server {
    dialect: Dialect,
    objects: Mutex<BTreeMap<String, Bytes>>,
    /// What the next requests are answered with, before they are looked at.
    faults: Mutex<Vec<Fault>>,
    /// Listings begin at the beginning, as if nobody had said where to begin.
    knows_no_beginning: Mutex<bool>,
    requests: Mutex<usize>,
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
    *server.requests.lock().unwrap() += 1;
    let fault = server.faults.lock().unwrap().pop();
    if let Some(Fault::Answer(status)) = fault {
        return error(StatusCode::from_u16(status).unwrap());
    }
    let (parts, body) = request.into_parts();
    signed(&server, &parts.uri, &parts.headers);
    let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
    let key = parts.uri.path().strip_prefix("/bucket").expect("everything is in it");
    let key = key.trim_start_matches('/').replace("%2F", "/").replace("%2E", ".");
    let response = match parts.method {
        Method::GET if key.is_empty() => list(&server, parts.uri.query().unwrap_or_default()),
        Method::PUT => put(&server, key, &parts.headers, body),
        Method::GET | Method::HEAD => get(&server, &key, &parts.headers, fault),
        Method::POST if server.dialect.is_azure() && key.is_empty() => delete_some(&server, &body, fault),
        Method::DELETE if !server.dialect.is_azure() => {
            let was = server.objects.lock().unwrap().remove(&key);
            match server.dialect {
                Dialect::Gcs if was.is_none() => error(StatusCode::NOT_FOUND),
                _ => StatusCode::NO_CONTENT.into_response(),
            }
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

/// Every request says who asks.
fn signed(server: &Server, uri: &Uri, headers: &HeaderMap) {
    let shown = headers.get("authorization").map(|shown| shown.to_str().unwrap()).unwrap_or_default();
    match server.dialect {
        Dialect::S3 => assert!(shown.starts_with("AWS4-HMAC-SHA256 Credential=key/"), "{shown}"),
        Dialect::Gcs => {
            let token: Vec<&str> = shown.strip_prefix("Bearer ").unwrap().split('.').collect();
            let [_, claims, _] = token[..] else { panic!("no signed token: {shown}") };
            let claims = base64::prelude::BASE64_URL_SAFE_NO_PAD.decode(claims).unwrap();
            assert!(String::from_utf8(claims).unwrap().contains("writer@shop.example"));
        }
        Dialect::Azure => assert!(shown.starts_with("SharedKey shop:"), "{shown}"),
        Dialect::AzureBySas => assert!(uri.query().unwrap().contains(&format!("sig={SECRET}")), "{uri}"),
    }
}

fn put(server: &Server, key: String, headers: &HeaderMap, body: Bytes) -> Response {
    let mut objects = server.objects.lock().unwrap();
    let (condition, value) = match server.dialect {
        Dialect::Gcs => ("x-goog-if-generation-match", "0"),
        _ => ("if-none-match", "*"),
    };
    assert_eq!(headers.get(condition).unwrap(), value, "every put has its condition");
    if objects.contains_key(&key) {
        return error(match server.dialect.is_azure() {
            true => StatusCode::CONFLICT,
            false => StatusCode::PRECONDITION_FAILED,
        });
    }
    if server.dialect.is_azure() {
        assert_eq!(headers.get("x-ms-blob-type").unwrap(), "BlockBlob");
    }
    objects.insert(key, body);
    (StatusCode::CREATED, [("etag", "\"1\"")]).into_response()
}

fn get(server: &Server, key: &str, headers: &HeaderMap, fault: Option<Fault>) -> Response {
    let Some(bytes) = server.objects.lock().unwrap().get(key).cloned() else {
        return error(StatusCode::NOT_FOUND);
    };
    let total = bytes.len();
    let range = headers.get("range").map(|range| {
        let (from, to) = range.to_str().unwrap().trim_start_matches("bytes=").split_once('-').unwrap();
        from.parse::<usize>().unwrap()..to.parse::<usize>().unwrap_or(total).saturating_add(1).min(total)
    });
    let status = if range.is_some() { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
    let range = range.unwrap_or(0..total);
    let body = bytes.slice(range.clone());
    let mut response = Response::builder()
        .status(status)
        .header("etag", "\"1\"")
        .header("last-modified", TIME)
        .header("content-length", body.len());
    if status == StatusCode::PARTIAL_CONTENT {
        let last = range.end - 1;
        response = response.header("content-range", format!("bytes {}-{last}/{total}", range.start));
    }
    response.body(as_asked(body, fault)).unwrap()
}

/// The body, or half of it.
fn as_asked(body: Bytes, fault: Option<Fault>) -> Body {
    if fault != Some(Fault::CutBody) {
        return Body::from(body);
    }
    let half = body.slice(..body.len() / 2);
    let pieces = [Ok(half), Err(std::io::Error::other("the connection ends"))];
    Body::from_stream(futures_util::stream::iter(pieces))
}

/// Microsoft's store takes deletions in batches, and answers each of them with an answer of its own in the body.
fn delete_some(server: &Server, batch: &[u8], fault: Option<Fault>) -> Response {
    let batch = std::str::from_utf8(batch).unwrap();
    let mut body = String::new();
    for (number, request) in batch.split("\r\nDELETE /bucket/").skip(1).enumerate() {
        let (target, rest) = request.split_once(" HTTP/1.1").unwrap();
        let (key, query) = target.split_once('?').unwrap_or((target, ""));
        let is_signed = match server.dialect {
            Dialect::AzureBySas => query.contains(&format!("sig={SECRET}")),
            _ => rest.contains("Authorization: SharedKey shop:"),
        };
        assert!(is_signed, "each one says who asks: {request}");
        let status = match server.objects.lock().unwrap().remove(key) {
            Some(_) => "202 Accepted",
            None => "404 The specified blob does not exist.",
        };
        body += &format!(
            "--answer\r\nContent-Type: application/http\r\nContent-ID: {number}\r\n\r\nHTTP/1.1 {status}\r\n\r\n"
        );
    }
    body += "--answer--\r\n";
    Response::builder()
        .status(StatusCode::ACCEPTED)
        .header("content-type", "multipart/mixed; boundary=answer")
        .body(as_asked(body.into(), fault))
        .unwrap()
}

fn list(server: &Server, query: &str) -> Response {
    let value = |key: &str| {
        let found = query.split('&').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='));
        found.map(|value| value.replace("%2F", "/")).unwrap_or_default()
    };
    let said =
        |key: &str| if *server.knows_no_beginning.lock().unwrap() { String::new() } else { value(key) };
    let objects = server.objects.lock().unwrap();
    let mut all: Vec<(&String, &Bytes)> =
        objects.iter().filter(|(key, _)| key.starts_with(&value("prefix"))).collect();
    // Microsoft's begins with what it is told, and the others behind it.
    if server.dialect.is_azure() {
        assert_eq!((value("restype").as_str(), value("comp").as_str()), ("container", "list"));
        let from = value("marker").max(said("startFrom"));
        all.retain(|(key, _)| **key >= from);
    } else {
        let after = value("continuation-token").max(said("start-after"));
        all.retain(|(key, _)| **key > after);
    }
    // Pages of two, so that there are several.
    let page = &all[..all.len().min(2)];
    let body = if server.dialect.is_azure() {
        let blobs: String = page
            .iter()
            .map(|(key, bytes)| {
                let size = bytes.len();
                format!(
                    "<Blob><Name>{key}</Name><Properties><Last-Modified>{TIME}</Last-Modified><Etag>1</Etag>\
                     <Content-Length>{size}</Content-Length><Content-Type>x/y</Content-Type></Properties></Blob>"
                )
            })
            .collect();
        let next = all.get(2).map_or("", |(key, _)| key.as_str());
        format!(
            "<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker>{next}</NextMarker></EnumerationResults>"
        )
    } else {
        let contents: String = page
            .iter()
            .map(|(key, bytes)| {
                let (size, time) = (bytes.len(), "2026-11-20T20:54:54.000Z");
                format!("<Contents><Key>{key}</Key><LastModified>{time}</LastModified><Size>{size}</Size><ETag>\"1\"</ETag></Contents>")
            })
            .collect();
        let next = match page.last() {
            Some((key, _)) if all.len() > 2 => {
                format!("<NextContinuationToken>{key}</NextContinuationToken>")
            }
            _ => String::new(),
        };
        format!("<ListBucketResult>{contents}{next}</ListBucketResult>")
    };
    ([("content-type", "application/xml")], body).into_response()
}

async fn started(dialect: Dialect) -> (Shared, Store) {
    let (server, endpoint) = serving(dialect).await;
    (server, open(dialect, &endpoint, true))
}

async fn serving(dialect: Dialect) -> (Shared, String) {
    let server = Arc::new(Server {
        dialect,
        objects: Mutex::default(),
        faults: Mutex::default(),
        knows_no_beginning: Mutex::default(),
        requests: Mutex::default(),
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let router = Router::new().fallback(answer).with_state(Arc::clone(&server));
    tokio::spawn(async move { axum::serve(listener, router).await });
    (server, endpoint)
}

fn open(dialect: Dialect, endpoint: &str, allow_http: bool) -> Store {
    let endpoint = Some(endpoint.to_owned());
    let azure = |key, endpoint| {
        let account = "shop".to_owned();
        let credentials = AzureCredentials { account, key: Some(key), endpoint, allow_http };
        Store::azure("azure://bucket/some/folder", credentials).unwrap()
    };
    match dialect {
        Dialect::S3 => {
            let credentials = Credentials {
                access_key: Some("key".to_owned()),
                secret_key: Some(SECRET.to_owned()),
                region: None,
                endpoint,
                allow_http,
            };
            Store::s3("s3://bucket/some/folder", credentials).unwrap()
        }
        Dialect::Gcs => {
            let service_account = Some(service_account());
            let credentials = GcsCredentials { service_account, endpoint, allow_http };
            Store::gcs("gs://bucket/some/folder", credentials).unwrap()
        }
        Dialect::Azure => azure(AzureKey::Account(SECRET.to_owned()), endpoint),
        Dialect::AzureBySas => {
            let token = format!("?sv=2023-11-03&sp=rwdl&sr=c&sig={SECRET}");
            azure(AzureKey::Sas(token), endpoint)
        }
    }
}

/// As Google gives them out, and with keys that would lead elsewhere, unsigned.
fn service_account() -> String {
    let key = aws_lc_rs::rsa::KeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa2048).unwrap();
    let der = key.as_der().unwrap();
    let base64 = BASE64_STANDARD.encode(der.as_ref());
    let lines: Vec<&str> =
        base64.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    let pem = format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", lines.join("\n"));
    serde_json::json!({
        "type": "service_account",
        "private_key_id": "1",
        "private_key": pem,
        "client_email": "writer@shop.example",
        "gcs_base_url": "http://elsewhere.example",
        "disable_oauth": true,
    })
    .to_string()
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

/// All that could be printed of it.
fn told(error: &StoreError) -> String {
    let causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
    causes.fold(format!("{error}\n{error:?}"), |told, cause| format!("{told}\n{cause}\n{cause:?}"))
}

#[test]
fn each_store_keeps_the_contract() {
    with_each(async |dialect| {
        let (server, store) = started(dialect).await;
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
        *server.knows_no_beginning.lock().unwrap() = true;
        let page = store.list("a/", Some(&name("a/2")), 5).await.unwrap();
        assert_eq!((names(&page.objects), page.more), (vec!["a/3".to_owned()], false));
        store.delete(&name("a/3")).await.unwrap();
        store.delete(&name("a/3")).await.unwrap();
        assert!(store.head(&name("a/3")).await.unwrap_err().is_absent());
    });
}

#[test]
fn a_store_that_fails_for_a_while_is_asked_again_and_one_that_refuses_says_so() {
    with_each(async |dialect| {
        let (server, store) = started(dialect).await;
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
        let error = store.put(&name("d"), "one".into()).await.unwrap_err();
        assert!(
            error.hint().is_some_and(|hint| hint.contains("permitted")) && !told(&error).contains(SECRET)
        );
        next(&[Fault::Answer(403)]);
        let error = store.delete(&name("a")).await.unwrap_err();
        assert!(error.failure.is_unsure() && !told(&error).contains(SECRET), "{}", told(&error));
        next(&[Fault::Answer(403)]);
        let error = store.read(&name("d"), 10).await.unwrap_err();
        assert!(!told(&error).contains(SECRET), "{}", told(&error));
        assert_eq!(error.failure, Failure::Denied, "not absent: {error}");
        next(&[Fault::Answer(403)]);
        // The library does not say of a listing why it failed; its message does.
        let error = store.list("a/", None, 10).await.unwrap_err();
        let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        assert!(error.failure.is_unsure() && cause.contains("403"), "{error}: {cause}");
        assert!(!told(&error).contains(SECRET), "{}", told(&error));
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
fn a_body_that_is_cut_off_is_read_again_and_one_that_always_is_is_an_error() {
    with_each(async |dialect| {
        let (server, store) = started(dialect).await;
        let content = Bytes::from(crate::testing::Random(1).bytes(100_000));
        store.put(&name("a"), content.clone()).await.unwrap();
        *server.faults.lock().unwrap() = vec![Fault::CutBody];
        assert_eq!(store.read(&name("a"), 1 << 20).await.unwrap(), content);
        assert_eq!(server.faults.lock().unwrap().len(), 0, "the fault was met");
        *server.faults.lock().unwrap() = vec![Fault::CutBody; 1000];
        let error = store.read(&name("a"), 1 << 20).await.unwrap_err();
        assert!(error.failure.is_unsure(), "{error}");
        assert!(!told(&error).contains(SECRET), "{}", told(&error));
        server.faults.lock().unwrap().clear();
        assert_eq!(store.read(&name("a"), 1 << 20).await.unwrap(), content);
        *server.faults.lock().unwrap() = vec![Fault::CutBody];
        store.delete(&name("a")).await.unwrap();
        assert!(store.head(&name("a")).await.is_err(), "it is deleted");
    });
}

#[test]
fn without_tls_nothing_is_said_unless_it_is_asked_for() {
    with_each(async |dialect| {
        let (server, endpoint) = serving(dialect).await;
        let error = open(dialect, &endpoint, false).read(&name("a"), 10).await.unwrap_err();
        assert_eq!(error.failure, Failure::Failed, "{error}");
        assert!(!told(&error).contains(SECRET), "{}", told(&error));
        assert_eq!(*server.requests.lock().unwrap(), 0, "{dialect:?} was asked nothing");
    });
}

#[test]
fn nothing_of_a_key_that_cannot_be_used_is_told() {
    let gcs = |service_account: String| {
        let credentials =
            GcsCredentials { service_account: Some(service_account), endpoint: None, allow_http: false };
        assert!(!format!("{credentials:?}").contains(SECRET));
        Store::gcs("gs://bucket", credentials).unwrap_err()
    };
    let account = |key: &str| {
        let account = serde_json::json!({ "private_key": key, "private_key_id": "1", "client_email": "a@b" });
        gcs(account.to_string())
    };
    let azure = |key: AzureKey| {
        let credentials = AzureCredentials {
            account: "shop".to_owned(),
            key: Some(key),
            endpoint: None,
            allow_http: false,
        };
        assert!(!format!("{credentials:?}").contains(SECRET));
        Store::azure("azure://container", credentials).unwrap_err()
    };
    for (error, why) in [
        (gcs(SECRET.to_owned()), "no JSON"),
        (gcs(format!("\"{SECRET}\"")), "no private_key"),
        (gcs(format!("{{\"private_key\": [\"{SECRET}\"]}}")), "no private_key"),
        (account(SECRET), "no key in PEM"),
        (account(&format!("-----BEGIN PRIVATE KEY-----{SECRET}-----END PRIVATE KEY-----")), "no key in PEM"),
        (account(&format!("-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----")), ""),
        (azure(AzureKey::Account(format!("{SECRET}!"))), "not in base64"),
        (azure(AzureKey::Sas(SECRET.to_owned())), "no signature"),
    ] {
        let told = told(&error);
        assert!(told.contains(why) && !told.contains(SECRET), "{told}");
        assert!(error.doing == crate::store::Doing::Opening && error.hint().is_some());
    }
    for url in ["gs://", "gs:///folder"] {
        let error = Store::gcs(url, GcsCredentials::default()).unwrap_err();
        assert!(told(&error).contains("gs://bucket/folder"), "{}", told(&error));
    }
}

fn with_each(test: impl AsyncFn(Dialect)) {
    // Beside each other: what fails always is asked for a while.
    crate::testing::run(futures_util::future::join_all(ALL.map(|dialect| test(dialect))));
}

//! Answers without an end.

use std::sync::Arc;
use std::time::Duration;

use pgherd_api::logs::LogsQuery;
use pgherd_api::routing::RoutingQuery;
use pgherd_api::{CallError, Code};

use crate::herd::{Herd, Server};

#[tokio::test]
async fn lines_arrive_one_by_one_and_the_stream_ends_with_its_source() {
    let herd = Herd::new();
    let server = Server::start(&herd).await;
    let client = server.client(&herd.operator("anna"));
    let query = LogsQuery { node: Some("a".to_owned()), follow: false, tail: Some(1000) };
    let mut lines = client.logs(&query).await.unwrap();
    for number in 0..1000 {
        let line = lines.next().await.unwrap().unwrap();
        assert_eq!(line.text, format!("line {number}\nwith two lines"));
    }
    assert_eq!(lines.next().await.unwrap(), None);
    assert_eq!(server.backend.last_call().unwrap(), r#"logs of Some("a")"#);
}

/// A quiet stream is told from a dead one by its empty lines, which nobody sees.
#[tokio::test]
async fn a_quiet_stream_stays_open_and_does_not_hold_up_other_calls() {
    let herd = Herd::new();
    let server = Server::start(&herd).await;
    let client = server.client(&herd.node("b"));
    let mut tables = client.routing(&RoutingQuery::default()).await.unwrap();
    let table = tables.next().await.unwrap().unwrap();
    assert_eq!((table.term, table.valid_for_ms), (4, 2500));
    let quiet = tokio::time::timeout(Duration::from_secs(16), tables.next()).await;
    assert!(quiet.is_err(), "longer than a silent peer would be listened to: {quiet:?}");
    client.status().await.unwrap();
}

#[tokio::test]
async fn a_listener_that_stops_ends_its_streams() {
    let herd = Herd::new();
    let server = Server::start(&herd).await;
    let client = server.client(&herd.node("b"));
    let mut tables = client.routing(&RoutingQuery::default()).await.unwrap();
    tables.next().await.unwrap().unwrap();
    let stopped = tokio::time::timeout(Duration::from_secs(5), server.stop()).await;
    assert!(stopped.is_ok(), "a stream keeps the listener from stopping");
    let ended = tokio::time::timeout(Duration::from_secs(5), tables.next()).await.unwrap();
    assert!(!matches!(ended, Ok(Some(_))), "{ended:?}");
}

/// What the agent lists of a proxy lives as long as its stream, and a proxy that is killed says no goodbye.
#[tokio::test]
async fn a_stream_ends_with_its_reader_and_nobody_speaks_for_another_proxy() {
    let herd = Herd::new();
    let server = Server::start(&herd).await;
    let query = RoutingQuery {
        cluster: Some("main".to_owned()),
        proxy: Some("up".to_owned()),
        process: Some("4f1c".to_owned()),
        listen: Some("127.0.0.1:9999".to_owned()),
        read_listen: Some("[::1]:9998".to_owned()),
    };
    for other in [herd.proxy("down"), herd.node("up"), herd.operator("up")] {
        match server.client(&other).routing(&query).await.map(drop) {
            Err(CallError::Answered { http_status: 403, error, .. }) => {
                assert!(error.is(Code::CredentialsInsufficient), "{error:?}");
            }
            others => panic!("{other:?}: {others:?}"),
        }
    }
    let mut tables = server.client(&herd.proxy("up")).routing(&query).await.unwrap();
    tables.next().await.unwrap().unwrap();
    let said = r#"up: routing of Some("4f1c"), Some("127.0.0.1:9999") and Some("[::1]:9998")"#;
    assert_eq!(server.backend.last_call().unwrap(), said);
    assert_eq!(Arc::strong_count(&server.backend.stream), 2);

    drop(tables);
    let deadline = std::time::Instant::now() + Duration::from_secs(3);
    while Arc::strong_count(&server.backend.stream) > 1 {
        assert!(std::time::Instant::now() < deadline, "the stream outlives its reader");
        // sleep: between two looks.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

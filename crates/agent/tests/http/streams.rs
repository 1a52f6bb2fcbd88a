//! Answers without an end.

use std::time::Duration;

use pgherd_api::logs::LogsQuery;

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
    let mut tables = client.routing().await.unwrap();
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
    let mut tables = client.routing().await.unwrap();
    tables.next().await.unwrap().unwrap();
    let stopped = tokio::time::timeout(Duration::from_secs(5), server.stop()).await;
    assert!(stopped.is_ok(), "a stream keeps the listener from stopping");
    let ended = tokio::time::timeout(Duration::from_secs(5), tables.next()).await.unwrap();
    assert!(!matches!(ended, Ok(Some(_))), "{ended:?}");
}

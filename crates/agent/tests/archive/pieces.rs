//! What is not a whole segment yet is in the archive as well, a moment later.

use std::time::Duration;

use pgherd_agent::archive::{Archiving, Order};
use pgherd_backup::wal::{Fetched, Segment, Segments};
use pgherd_core::types::{Lsn, Timeline};

use crate::harness::story;
use crate::scene::{SEGMENT_BYTES, Scene, durable, fill, write};

/// What the archive has of the segment with this position, compared with the server's file; up to where it goes.
async fn fetched(scene: &Scene, position: Lsn) -> Lsn {
    let segments = Segments::new(SEGMENT_BYTES as u32).unwrap();
    let segment = Segment { timeline: Timeline(2), number: segments.number(position) };
    let file = scene.nodes[0].instance().pg_wal().join(segments.file_name(segment));
    let (content, end) = match scene.archive().fetch(segment).await.unwrap() {
        Fetched::Whole(content) => (content, segments.end(segment)),
        Fetched::Beginning { content, end } => (content, end),
    };
    let bytes = (end.0 - segments.start(segment).0) as usize;
    assert!(content[..bytes] == std::fs::read(file).unwrap()[..bytes], "up to {end}");
    assert!(content[bytes..].iter().all(|byte| *byte == 0), "and nothing behind it");
    end
}

story! {
    async fn case_11_what_was_written_a_moment_ago_is_durable_on_a_server_that_fills_no_segment() {
        let scene = Scene::new(&[]).await;
        let session = scene.nodes[0].session().await;
        let order = Order { piece_every: Some(Duration::from_millis(100)), ..scene.order(0).await };
        let archiving = Archiving::begin(order.clone());
        let mut written = Lsn(0);
        for _ in 0..5 {
            written = write(&session).await;
            durable(&archiving, written).await;
            assert!(fetched(&scene, written).await >= written);
        }
        archiving.end().await;

        // Whoever is next goes on behind them.
        let later = write(&session).await;
        assert_eq!(later.0 / SEGMENT_BYTES, written.0 / SEGMENT_BYTES, "still the same segment");
        let archiving = Archiving::begin(order);
        durable(&archiving, later).await;
        assert!(fetched(&scene, later).await >= later);
        let end = fill(&session).await;
        let status = durable(&archiving, end).await;
        assert!(status.last_error.is_none());
        assert_eq!(fetched(&scene, later).await.0 % SEGMENT_BYTES, 0, "it is whole");
        archiving.end().await;
        assert!(!scene.compare(0, Timeline(2)).await.is_empty());
    }
}

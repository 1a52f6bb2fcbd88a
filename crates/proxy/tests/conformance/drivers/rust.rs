//! Drivers for Rust, whose scripts are functions here: what they saw is compared line by line, too.

use std::fmt::Debug;
use std::fmt::Write as _;
use std::time::Duration;

use pgherd_proxy::PoolMode;

use super::difference;
use crate::harness::{Stand, left_out, story};

mod pg_sqlx;
mod pg_tokio;

const SOON: Duration = Duration::from_secs(120);

story! {
    fn tokio_postgres_sees_no_difference_with_session_pooling() {
        see_no_difference("tokio-postgres", PoolMode::Session, pg_tokio::script);
    }
}

story! {
    fn tokio_postgres_sees_no_difference_with_transaction_pooling() {
        see_no_difference("tokio-postgres", PoolMode::Transaction, pg_tokio::script);
    }
}

story! {
    fn sqlx_sees_no_difference_with_session_pooling() {
        see_no_difference("sqlx", PoolMode::Session, pg_sqlx::script);
    }
}

story! {
    fn sqlx_sees_no_difference_with_transaction_pooling() {
        see_no_difference("sqlx", PoolMode::Transaction, pg_sqlx::script);
    }
}

fn see_no_difference(name: &str, mode: PoolMode, script: impl AsyncFn(&str, &mut Seen)) {
    let [direct, proxied] = [None, Some(mode)].map(|mode| {
        let stand = Stand::new(mode);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let mut seen = Seen::default();
        let done = runtime.block_on(async {
            let url = format!("postgres://{}", stand.authority());
            tokio::time::timeout(SOON, script(&url, &mut seen)).await
        });
        assert!(done.is_ok(), "{name}, port {}, is not done in time:\n{}", stand.port(), seen.lines);
        assert_eq!(stand.was_used_for("postgres"), mode.is_some());
        seen.lines
    });
    let difference = difference(&direct, &proxied, |step| left_out(name, step, mode).is_some());
    assert_eq!(difference, None, "{name} sees a difference");
}

/// A line for each step; nothing in it differs between two runs on the same server.
#[derive(Default)]
struct Seen {
    lines: String,
}

impl Seen {
    fn say(&mut self, step: &str, value: impl Debug) {
        writeln!(self.lines, "{step}: {value:?}").unwrap();
    }
}

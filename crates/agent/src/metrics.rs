//! What the agent counts and measures, for Prometheus.
//!
//! Each metric is defined once, with its help text. A measurement that is not known is absent from the
//! output: a lag of 0 that nobody measured would silence the alarm for it.

use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

macro_rules! measurements {
    ($($(#[$doc:meta])* $field:ident: $type:ty, $unit:expr, $help:literal;)*) => {
        /// All that is known of the node at one moment. None is unknown.
        #[derive(Clone, Debug, Default, PartialEq)]
        pub struct Measurements { $($(#[$doc])* pub $field: Option<$type>),* }

        impl Measurements {
            fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
                $(if let Some(value) = self.$field {
                    let gauge = ConstGauge::new(value.gauged());
                    let unit: Option<Unit> = $unit;
                    let each = encoder.encode_descriptor(stringify!($field), concat!($help, "."), unit.as_ref(), gauge.metric_type())?;
                    gauge.encode(each)?;
                })*
                Ok(())
            }
        }
    };
}

measurements! {
    term: u64, None, "Number of the reign that this node knows of";
    primary: bool, None, "1 if this node holds the term";
    gate_open: bool, None, "1 if clients may use this node as the primary";
    degraded: bool, None, "1 while commits are acknowledged by fewer voters than needed";
    voters: u64, None, "Standbys whose flush counts for a commit";
    needed: u64, None, "Standbys that must flush each commit";
    postgres_running: bool, None, "1 if PostgreSQL accepts connections";
    streaming: bool, None, "1 if this standby streams from its upstream";
    barred: bool, None, "1 while damage keeps this node from being elected";
    paused: bool, None, "1 while the cluster is paused";
    pending_restart: bool, None, "1 if a changed parameter waits for a restart";
    timeline: u64, None, "PostgreSQL's timeline";
    flush_lsn: u64, Some(Unit::Bytes), "Position up to which WAL is flushed here";
    replay_lsn: u64, Some(Unit::Bytes), "Position up to which WAL is replayed here";
    lag: u64, Some(Unit::Bytes), "The primary's flush position minus this node's";
    replay_lag: f64, Some(Unit::Seconds), "Age of what was replayed last, while behind";
    store_leader: bool, None, "1 if this node leads the store, which says nothing about PostgreSQL";
    store_members: u64, None, "Members of the store";
    store_reachable: bool, None, "1 if the store could be read linearizably a moment ago";
    peers: u64, None, "Other agents of this herd";
    peers_reachable: u64, None, "Other agents that answered a moment ago";
    lease_remaining: f64, Some(Unit::Seconds), "What is left of the proof that this node may serve reads";
    fence_armed: bool, None, "1 while the fence would stop PostgreSQL if the agent froze";
    vip_held: bool, None, "1 while the address that moves with the gate is on this host";
    certificate_remaining: f64, Some(Unit::Seconds), "Until this node's certificate expires";
    spec_generation: u64, None, "Generation of the specification that this node follows";
}

/// How a measurement is written.
trait Gauged {
    fn gauged(self) -> f64;
}

impl Gauged for bool {
    fn gauged(self) -> f64 {
        f64::from(u8::from(self))
    }
}

/// A position is exact up to 8 PiB of WAL.
impl Gauged for u64 {
    fn gauged(self) -> f64 {
        self as f64
    }
}

impl Gauged for f64 {
    fn gauged(self) -> f64 {
        self
    }
}

macro_rules! counters {
    ($($field:ident, $help:literal;)*) => {
        /// What has happened since the agent started.
        #[derive(Debug, Default)]
        pub struct Counters { $(pub $field: Counter),* }

        impl Counters {
            fn register(&self, registry: &mut Registry) {
                $(registry.register(stringify!($field), $help, self.$field.clone());)*
            }
        }
    };
}

counters! {
    elections, "Elections that this node took part in";
    promotions, "Promotions of this node";
    switchovers, "Planned hand-overs from or to this node";
    seals, "Times that this node stopped receiving from an old term to vote";
    rejoins, "Times that this node came back as a standby";
    reclones, "Times that this node was copied anew";
    postgres_starts, "Starts of PostgreSQL";
    postgres_crashes, "Ends of PostgreSQL that nobody asked for";
    heartbeats_late, "Heartbeat commits that were not acknowledged in time";
    store_failures, "Requests to the store that failed";
    peer_failures, "Requests to other agents that failed";
    decisions, "Decisions that changed the goal or the reason";
}

pub struct Metrics {
    registry: Registry,
    measurements: Arc<ArcSwap<Measurements>>,
    pub counters: Counters,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").field("measurements", &self.measurements).finish_non_exhaustive()
    }
}

/// The last measurements, read when somebody asks.
#[derive(Debug)]
struct Latest(Arc<ArcSwap<Measurements>>);

impl Collector for Latest {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.0.load().encode(&mut encoder)
    }
}

impl Metrics {
    /// Every metric carries these three labels. A witness belongs to no cluster.
    pub fn new(herd: &str, cluster: Option<&str>, node: &str) -> Metrics {
        let labels = [("herd", Some(herd)), ("cluster", cluster), ("node", Some(node))];
        let labels =
            labels.into_iter().filter_map(|(name, value)| Some((name.into(), value?.to_owned().into())));
        let mut registry = Registry::with_prefix_and_labels("pgherd", labels);
        let measurements = Arc::new(ArcSwap::from_pointee(Measurements::default()));
        registry.register_collector(Box::new(Latest(Arc::clone(&measurements))));
        let counters = Counters::default();
        counters.register(&mut registry);
        Metrics { registry, measurements, counters }
    }

    pub fn measured(&self, measurements: Measurements) {
        self.measurements.store(Arc::new(measurements));
    }

    /// OpenMetrics text.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        match prometheus_client::encoding::text::encode(&mut text, &self.registry) {
            Ok(()) => text,
            Err(fmt::Error) => unreachable!("a String takes everything, and no metric of this file fails"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_is_shown_and_what_is_not_is_absent() {
        let metrics = Metrics::new("shop", Some("main"), "a");
        assert!(!metrics.encode().contains("pgherd_lag_bytes"));
        metrics.measured(Measurements { lag: Some(4096), gate_open: Some(true), ..Measurements::default() });
        metrics.counters.elections.inc();
        let text = metrics.encode();
        let labels = r#"{herd="shop",cluster="main",node="a"}"#;
        for line in [
            format!("pgherd_lag_bytes{labels} 4096.0"),
            format!("pgherd_gate_open{labels} 1.0"),
            format!("pgherd_elections_total{labels} 1"),
            "# HELP pgherd_lag_bytes The primary's flush position minus this node's.".to_owned(),
            "# TYPE pgherd_lag_bytes gauge".to_owned(),
            "# EOF".to_owned(),
        ] {
            assert!(text.lines().any(|found| found == line), "no line {line:?} in\n{text}");
        }
        assert!(!text.contains("pgherd_term"), "the term is not known");
    }

    #[test]
    fn a_witness_has_no_cluster() {
        let metrics = Metrics::new("shop", None, "w");
        assert!(metrics.encode().contains(r#"pgherd_elections_total{herd="shop",node="w"} 0"#));
    }
}

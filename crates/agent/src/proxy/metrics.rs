//! What a proxy counts, for Prometheus.
//!
//! Numbers are taken when somebody asks. Databases are told apart, as many as [`pgherd_proxy::observed::MOST_DATABASES`], so
//! that the answer has a limit; users are not. A number that is not known is absent.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use pgherd_proxy::Proxy;
use pgherd_proxy::counts::{BUCKETS_US, Spread};
use pgherd_proxy::observed::{Database, Observation};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

const PREFIX: &str = "pgherd_proxy";

/// For one proxy: OpenMetrics text.
pub(super) fn text(proxy: &Arc<Proxy>, herd: &str, cluster: &str, name: &str) -> String {
    encode(proxy.observe(), herd, cluster, name)
}

fn encode(observation: Observation, herd: &str, cluster: &str, name: &str) -> String {
    let labels = [("herd", herd), ("cluster", cluster), ("proxy", name)];
    let labels = labels.into_iter().map(|(name, value)| (name.into(), value.to_owned().into()));
    let mut registry = Registry::with_prefix_and_labels(PREFIX, labels);
    registry.register_collector(Box::new(Moment(observation)));
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &registry) {
        Ok(()) => text,
        Err(fmt::Error) => unreachable!("a String takes everything, and no metric of this file fails"),
    }
}

#[derive(Debug)]
struct Moment(Observation);

/// A value for each label of one kind.
type Labelled<T> = Vec<([(&'static str, String); 1], T)>;

fn gauge(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<Unit>,
    value: f64,
) -> fmt::Result {
    encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?.encode_gauge(&value)
}

fn gauges(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<Unit>,
    values: Labelled<f64>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
    for (label, value) in values {
        family.encode_family(&label)?.encode_gauge(&value)?;
    }
    Ok(())
}

fn counters(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<Unit>,
    values: Labelled<f64>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
    for (label, value) in values {
        family.encode_family(&label)?.encode_counter::<NoLabelSet, _, f64>(&value, None)?;
    }
    Ok(())
}

fn histograms(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: Labelled<&Spread>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)?;
    for (label, spread) in values {
        let ends = BUCKETS_US.iter().map(|us| *us as f64 / 1e6).chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = ends.zip(spread.buckets).collect();
        let sum = spread.sum_us as f64 / 1e6;
        family.encode_family(&label)?.encode_histogram::<NoLabelSet>(sum, spread.count(), &buckets, None)?;
    }
    Ok(())
}

impl Moment {
    fn each_database<'a, T>(&'a self, value: impl Fn(&'a Database) -> T) -> Labelled<T> {
        let databases = self.0.databases.iter();
        databases.map(|(name, database)| ([("database", name.clone())], value(database))).collect()
    }

    fn each_node(&self, value: impl Fn(&pgherd_proxy::observed::Work) -> u64) -> Labelled<f64> {
        self.0.nodes.iter().map(|(node, work)| ([("node", node.to_string())], value(work) as f64)).collect()
    }
}

fn is(so: bool) -> f64 {
    f64::from(u8::from(so))
}

fn labelled<R: Copy>(
    label: &'static str,
    values: &[(R, u64)],
    word: impl Fn(R) -> &'static str,
) -> Labelled<f64> {
    values.iter().map(|(reason, count)| ([(label, word(*reason).to_owned())], *count as f64)).collect()
}

impl Collector for Moment {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (to, observed) = (&mut encoder, &self.0);
        let started = observed.started_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        gauge(to, "start_time", "When the proxy was started", Some(Unit::Seconds), started.as_secs_f64())?;
        let clients = observed.clients;
        let states = [
            ("active", clients.active),
            ("idle", clients.idle),
            ("waiting", clients.waiting),
            ("login", clients.login),
        ];
        let states = states.map(|(state, count)| ([("state", state.to_owned())], count as f64));
        gauges(
            to,
            "clients",
            "Clients: with a server, without one, waiting for one, coming in",
            None,
            states.into(),
        )?;
        gauge(to, "clients_limit", "Clients that there may be", None, observed.most_clients as f64)?;
        if let Some(term) = observed.term {
            gauge(to, "term", "Number of the newest reign that was heard of", None, term.0 as f64)?;
        }
        gauge(
            to,
            "gate_open",
            "1 if clients may begin something at the primary",
            None,
            is(observed.gate_open),
        )?;
        let left = observed.proof_left.as_secs_f64();
        gauge(
            to,
            "proof_remaining",
            "How long what was heard of the primary counts",
            Some(Unit::Seconds),
            left,
        )?;
        gauge(to, "paused", "1 while an operator has paused all databases", None, is(observed.paused_all))?;

        let mut servers: Vec<([(&str, String); 2], f64)> = Vec::new();
        for (name, database) in &observed.databases {
            for (state, count) in [
                ("active", database.active),
                ("idle", database.idle),
                ("opening", database.opening),
                ("closing", database.closing),
            ] {
                servers.push(([("database", name.clone()), ("state", state.to_owned())], count as f64));
            }
        }
        let mut family =
            to.encode_descriptor("servers", "Connections to PostgreSQL.", None, MetricType::Gauge)?;
        for (labels, count) in servers {
            family.encode_family(&labels)?.encode_gauge(&count)?;
        }
        let waiting = self.each_database(|database| database.waiting as f64);
        gauges(to, "waiting", "Clients that wait for a server", None, waiting)?;
        let longest = self.each_database(|database| database.longest_wait.as_secs_f64());
        gauges(
            to,
            "longest_wait",
            "How long the first client that waits has waited",
            Some(Unit::Seconds),
            longest,
        )?;
        let paused = self.each_database(|database| is(database.paused));
        gauges(to, "database_paused", "1 while an operator has paused the database", None, paused)?;

        let count = |value: fn(&Database) -> u64| self.each_database(|database| value(database) as f64);
        let queries = count(|database| database.totals.queries);
        counters(to, "queries", "Queries: simple ones, and extended ones up to their Sync", None, queries)?;
        let received = count(|database| database.totals.received_bytes);
        counters(to, "received", "What clients have sent", Some(Unit::Bytes), received)?;
        let sent = count(|database| database.totals.sent_bytes);
        counters(to, "sent", "What clients were sent", Some(Unit::Bytes), sent)?;
        let busy = self.each_database(|database| database.totals.query_us as f64 / 1e6);
        counters(to, "query", "Time in which queries were under way", Some(Unit::Seconds), busy)?;
        let logins = count(|database| database.totals.logins);
        counters(to, "logins", "Clients that came in", None, logins)?;
        let opened = count(|database| database.totals.opened);
        counters(to, "servers_opened", "Connections to PostgreSQL that were made", None, opened)?;
        let closed = count(|database| database.totals.closed);
        counters(to, "servers_closed", "Connections to PostgreSQL that have ended", None, closed)?;
        let held = count(|database| database.totals.held);
        counters(to, "held", "Clients that had to wait since nobody knew a primary", None, held)?;
        let transactions = self.each_database(|database| &database.totals.transaction_time);
        histograms(to, "transaction", "How long transactions had a server", transactions)?;
        let waits = self.each_database(|database| &database.totals.wait_time);
        histograms(to, "wait", "How long clients waited for the server that they got", waits)?;

        let events = &observed.events;
        let refused = labelled("reason", &events.no_entry, |why| why.word());
        counters(to, "refused", "Clients that did not come in", None, refused)?;
        let pins = labelled("reason", &events.pins, |pin| pin.word());
        counters(to, "pins", "Times that a client began to keep its server", None, pins)?;
        let pinned = labelled("reason", &observed.pinned, |pin| pin.word());
        gauges(to, "pinned", "Clients that keep their server", None, pinned)?;
        let ended = labelled("work", &events.ended, |what| what.word());
        counters(to, "ended", "Sessions that were ended with their server, by what was lost", None, ended)?;
        let help = "Clients that were given another server unnoticed.";
        let mut spared = to.encode_descriptor("spared", help, None, MetricType::Counter)?;
        spared.encode_counter::<NoLabelSet, _, f64>(&(events.spared as f64), None)?;
        let queries = self.each_node(|work| work.queries);
        counters(to, "node_queries", "Queries that went to this node", None, queries)?;
        let transactions = self.each_node(|work| work.transactions);
        counters(to, "node_transactions", "Transactions that went to this node", None, transactions)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use pgherd_core::types::Term;
    use pgherd_proxy::counts::{Ended, Events, NoEntry, Pin, Totals};
    use pgherd_proxy::observed::{Clients, Work};

    use super::*;

    const REFERENCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/reference/proxy-metrics.md");

    fn example() -> Observation {
        let mut totals =
            Totals { queries: 7, received_bytes: 1024, query_us: 1_500_000, ..Totals::default() };
        (totals.transaction_time.buckets[3], totals.transaction_time.sum_us) = (2, 1_600);
        let shop = Database { totals, active: 3, waiting: 1, ..Database::default() };
        Observation {
            started_at: SystemTime::UNIX_EPOCH,
            clients: Clients { active: 3, idle: 5, waiting: 1, login: 0 },
            most_clients: 10_000,
            databases: [("sh\"op".to_owned(), shop)].into(),
            events: Events {
                no_entry: NoEntry::ALL.iter().map(|why| (*why, 1)).collect(),
                pins: Pin::ALL.iter().map(|pin| (*pin, 2)).collect(),
                ended: Ended::ALL.iter().map(|what| (*what, 0)).collect(),
                spared: 4,
            },
            pinned: Pin::ALL.iter().map(|pin| (*pin, 0)).collect(),
            nodes: [("a".parse().unwrap(), Work { queries: 7, transactions: 2 })].into(),
            term: Some(Term(4)),
            gate_open: true,
            proof_left: Duration::from_millis(2_500),
            paused_all: false,
        }
    }

    #[test]
    fn numbers_are_written_as_prometheus_reads_them() {
        let text = encode(example(), "shop", "main", "up");
        let own = r#"herd="shop",cluster="main",proxy="up""#;
        for line in [
            format!("pgherd_proxy_clients{{{own},state=\"idle\"}} 5.0"),
            format!("pgherd_proxy_term{{{own}}} 4.0"),
            format!("pgherd_proxy_proof_remaining_seconds{{{own}}} 2.5"),
            format!("pgherd_proxy_servers{{{own},database=\"sh\\\"op\",state=\"active\"}} 3.0"),
            format!("pgherd_proxy_queries_total{{{own},database=\"sh\\\"op\"}} 7.0"),
            format!("pgherd_proxy_query_seconds_total{{{own},database=\"sh\\\"op\"}} 1.5"),
            format!("pgherd_proxy_transaction_seconds_bucket{{{own},le=\"0.0005\",database=\"sh\\\"op\"}} 0"),
            format!("pgherd_proxy_transaction_seconds_bucket{{{own},le=\"0.001\",database=\"sh\\\"op\"}} 2"),
            format!("pgherd_proxy_transaction_seconds_bucket{{{own},le=\"+Inf\",database=\"sh\\\"op\"}} 2"),
            format!("pgherd_proxy_transaction_seconds_sum{{{own},database=\"sh\\\"op\"}} 0.0016"),
            format!("pgherd_proxy_refused_total{{{own},reason=\"password\"}} 1.0"),
            format!("pgherd_proxy_node_queries_total{{{own},node=\"a\"}} 7.0"),
            "# EOF".to_owned(),
        ] {
            assert!(text.lines().any(|found| found == line), "no line {line:?} in\n{text}");
        }
        let unknown = Observation { term: None, ..example() };
        assert!(!encode(unknown, "shop", "main", "up").contains("pgherd_proxy_term"));
    }

    /// Every metric with its help, from what one proxy says.
    fn page() -> String {
        let text = encode(example(), "shop", "main", "up");
        let mut page = String::from(
            "# Metrics of a proxy\n\nPrometheus text over plain HTTP, `/metrics` at `metrics_listen` of `[proxy]` in the herd file. \
             Without that key there is none. Every\nmetric carries the labels `herd`, `cluster` and `proxy`. Histograms have buckets from \
             0.1 ms to a minute. No user is named, and no more\nthan 200 databases: what belongs to others is summed up as `(others)`. \
             Counters begin with the proxy.\n\n\
             | metric | type | labels | what it is |\n|---|---|---|---|\n",
        );
        let pairs = |what: &'static str| {
            text.lines().filter_map(move |line| line.strip_prefix(what)?.split_once(' '))
        };
        let kinds: BTreeMap<&str, &str> = pairs("# TYPE ").collect();
        for (name, help) in pairs("# HELP ") {
            let kind = kinds[name];
            let sample = text.lines().find(|line| line.starts_with(name)).unwrap();
            let labels =
                sample.split_once('{').unwrap().1.split("\",").filter_map(|label| label.split_once('='));
            let labels: Vec<String> = labels
                .map(|(label, _)| format!("`{label}`"))
                .filter(|label| !["`herd`", "`cluster`", "`proxy`", "`le`"].contains(&label.as_str()))
                .collect();
            let suffix = if kind == "counter" { "_total" } else { "" };
            let help = help.trim_end_matches('.');
            page.push_str(&format!("| `{name}{suffix}` | {kind} | {} | {help} |\n", labels.join(", ")));
        }
        page
    }

    #[test]
    fn golden_page_of_the_reference() {
        if std::env::var_os("PGHERD_UPDATE_GOLDEN").is_some_and(|value| !value.is_empty()) {
            std::fs::write(REFERENCE, page()).unwrap();
        }
        let recorded = std::fs::read_to_string(REFERENCE).unwrap();
        assert_eq!(page(), recorded, "PGHERD_UPDATE_GOLDEN=1 records it anew");
    }
}

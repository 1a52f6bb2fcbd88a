//! `schema/status.json` is what the program writes, and it accepts and refuses the right documents.
//!
//! After a deliberate change: `cargo test -p pgherd-api -- --ignored write_the_schema`, then look at the
//! difference.

use std::path::{Path, PathBuf};

use pgherd_api::status::{self, Status};
use serde_json::{Value, json};

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("schema/status.json")
}

fn checked_in() -> Value {
    serde_json::from_str(&std::fs::read_to_string(path()).unwrap()).unwrap()
}

#[test]
#[ignore = "writes: for a deliberate change of the contract"]
fn write_the_schema() {
    let text = serde_json::to_string_pretty(&status::schema()).unwrap();
    std::fs::write(path(), text + "\n").unwrap();
}

/// The example of the contract, with every field that may be null as null somewhere.
fn sample() -> Value {
    json!({
        "herd": "shop", "generation": 7,
        "store": {"kind": "raft", "leader": "b", "members": [
            {"name": "a", "voter": true, "reachable": true}, {"name": "w", "voter": false, "reachable": null}]},
        "clusters": [{
            "name": "main", "system_identifier": "7710000000000000001", "term": 4, "primary": "a",
            "gate": "open",
            "durability": {"mode": "quorum", "needed": 1, "voters": ["b"], "degraded": false},
            "members": [
                {"name": "a", "host": "127.0.0.1", "port": 21000, "role": "primary", "state": "running",
                 "timeline": 4, "lsn": "0/5000060", "lag_bytes": 0, "replay_lag_ms": 0, "sync": "primary",
                 "upstream": null, "reason": "holds term 4", "pending_restart": false},
                {"name": "c", "host": "127.0.0.1", "port": null, "role": "standby", "state": "catching up",
                 "timeline": null, "lsn": null, "lag_bytes": null, "replay_lag_ms": null, "sync": null,
                 "upstream": null, "reason": "no answer for 3 s", "pending_restart": null}],
            "backup": {"recovery_window": {"from": "2026-11-20T20:54:54Z", "to": "2026-11-20T21:00:00Z"},
                       "last": "20261120T205454", "wal_lag_seconds": 0.4, "repository": "s3://bucket/shop",
                       "owner": "c", "backups": 3,
                       "running": {"number": 5, "node": "c", "done_bytes": 4096, "total_bytes": null, "held_back_to": null},
                       "ended": {"number": 4, "node": "b", "at": null, "name": null, "failed": "no space left"},
                       "drill": {"node": "c", "at": "2026-11-20T20:54:54Z", "seconds": 75, "backup": "20261120T205454",
                                 "failed": null},
                       "gaps": ["timeline 3, 0/3000000 to 0/4000000"], "asked": "b: it has no 000000030000000000000003",
                       "filled": {"at": "2026-11-20T20:54:54Z", "files": 2, "from": ["a"]}, "trouble": null},
            "vip": {"address": "192.168.122.10/24", "interface": "eth0", "holder": "a",
                    "trouble": ["c: there is no interface eth0 on this host"]},
            "restore": {"node": "c", "backup": "20261120T205454", "end_lsn": "0/4000000", "timeline": 3,
                        "held": true, "trouble": null}},
            {"name": "other", "system_identifier": null, "term": null, "primary": null, "gate": "closed",
             "durability": {"mode": "async", "needed": 0, "voters": [], "degraded": false},
             "members": [], "backup": null, "vip": null, "restore": null}],
        "proxy": [{"cluster": "main", "listen": "127.0.0.1:9999", "target": "read-write"}]
    })
}

#[test]
fn the_schema_is_the_one_of_the_types() {
    assert_eq!(checked_in(), status::schema(), "crates/api/schema/status.json does not match the types");
}

#[test]
fn the_sample_survives_the_types_and_passes_the_schema() {
    let read: Status = serde_json::from_value(sample()).unwrap();
    let written = serde_json::to_value(&read).unwrap();
    assert_eq!(written, sample(), "nothing is renamed, dropped, or left out because it is null");
    let schema = checked_in();
    assert_eq!(violations(&schema, &schema, &sample(), "status"), Vec::<String>::new());
}

#[test]
fn the_spellings_are_those_of_the_contract() {
    let text = |value: Value| value.as_str().unwrap().to_owned();
    let of = |values: &[&str], each: &dyn Fn(&str) -> Value| {
        for spelling in values {
            assert_eq!(text(each(spelling)), *spelling);
        }
    };
    macro_rules! spelled {
        ($type:ty: $($spelling:literal),*) => {
            of(&[$($spelling),*], &|spelling| {
                let value: $type = serde_json::from_value(json!(spelling)).unwrap();
                serde_json::to_value(value).unwrap()
            });
        };
    }
    spelled!(status::Gate: "open", "closed", "draining");
    spelled!(status::Role: "primary", "standby", "delayed", "witness", "keeper");
    spelled!(status::State: "initializing", "starting", "running", "streaming", "catching up", "promoting",
        "rewinding", "cloning", "paused", "stopped", "unreachable", "barred");
    spelled!(status::Sync: "primary", "quorum", "potential", "async");
    spelled!(status::DurabilityMode: "quorum", "async");
    spelled!(status::StoreKind: "raft", "etcd");
    spelled!(status::ProxyTarget: "read-write", "read-only");
}

#[test]
fn the_schema_refuses_what_breaks_the_contract() {
    let schema = checked_in();
    type Breakage = (&'static str, fn(&mut Value));
    let breakages: &[Breakage] = &[
        ("an LSN as a number", |status| status["clusters"][0]["members"][0]["lsn"] = json!(83886176)),
        ("a system identifier as a number", |status| status["clusters"][0]["system_identifier"] = json!(7)),
        ("another spelling", |status| status["clusters"][0]["members"][1]["state"] = json!("catching_up")),
        ("an unknown gate", |status| status["clusters"][0]["gate"] = json!("ajar")),
        ("a lag below 0", |status| status["clusters"][0]["members"][0]["lag_bytes"] = json!(-1)),
        ("null where something is always known", |status| status["herd"] = Value::Null),
        ("a field left out", |status| {
            status["clusters"][0]["members"][0].as_object_mut().unwrap().remove("upstream");
        }),
    ];
    for (what, breakage) in breakages {
        let mut broken = sample();
        breakage(&mut broken);
        assert!(!violations(&schema, &schema, &broken, "status").is_empty(), "{what} must not pass");
    }
}

/// A reader of an earlier version must not trip over a field that was added since, nor over one missing
/// that may be null.
#[test]
fn readers_ignore_fields_they_do_not_know() {
    let mut later = sample();
    later["clusters"][0]["members"][0]["colour"] = json!("green");
    later["clusters"][0]["members"][0].as_object_mut().unwrap().remove("pending_restart");
    let read: Status = serde_json::from_value(later.clone()).unwrap();
    assert_eq!(read.clusters[0].members[0].pending_restart, None);
}

/// The keywords that the generator uses, and a panic on any other: a keyword that is not looked at would
/// make this test agree to everything.
fn violations(root: &Value, schema: &Value, value: &Value, at: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (keyword, rule) in schema.as_object().unwrap() {
        match keyword.as_str() {
            "$schema" | "title" | "description" | "$defs" | "format" => {}
            "$ref" => {
                let name = rule.as_str().unwrap().strip_prefix("#/$defs/").unwrap();
                found.extend(violations(root, &root["$defs"][name], value, at));
            }
            "type" => {
                let allowed = rule.as_array().cloned().unwrap_or_else(|| vec![rule.clone()]);
                if !allowed.iter().any(|name| has_type(value, name.as_str().unwrap())) {
                    found.push(format!("{at} is {value}, not {rule}"));
                }
            }
            "enum" => {
                if !rule.as_array().unwrap().contains(value) {
                    found.push(format!("{at} is {value}, not one of {rule}"));
                }
            }
            "const" => {
                if rule != value {
                    found.push(format!("{at} is {value}, not {rule}"));
                }
            }
            "minimum" => {
                if value.as_f64().is_some_and(|number| number < rule.as_f64().unwrap()) {
                    found.push(format!("{at} is {value}, below {rule}"));
                }
            }
            "maximum" => {
                if value.as_f64().is_some_and(|number| number > rule.as_f64().unwrap()) {
                    found.push(format!("{at} is {value}, above {rule}"));
                }
            }
            "anyOf" | "oneOf" => {
                let fits = |option: &&Value| violations(root, option, value, at).is_empty();
                if !rule.as_array().unwrap().iter().any(|option| fits(&option)) {
                    found.push(format!("{at} is {value}, which no alternative allows"));
                }
            }
            "required" => {
                for name in rule.as_array().unwrap() {
                    if value.is_object() && value.get(name.as_str().unwrap()).is_none() {
                        found.push(format!("{at} lacks {name}"));
                    }
                }
            }
            "properties" => {
                for (name, property) in rule.as_object().unwrap() {
                    if let Some(inner) = value.get(name) {
                        found.extend(violations(root, property, inner, &format!("{at}.{name}")));
                    }
                }
            }
            "items" => {
                for (index, inner) in value.as_array().into_iter().flatten().enumerate() {
                    found.extend(violations(root, rule, inner, &format!("{at}[{index}]")));
                }
            }
            other => panic!("the schema uses \"{other}\", which this test does not check"),
        }
    }
    found
}

fn has_type(value: &Value, name: &str) -> bool {
    match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "number" => value.is_number(),
        "integer" => value.is_i64() || value.is_u64(),
        other => panic!("unknown type {other}"),
    }
}

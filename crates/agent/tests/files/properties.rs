//! What holds for every file: reading ends with a value or with findings that can be shown, and what is
//! written is read back.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::time::Duration;

use pgherd_agent::files::agent::AgentFile;
use pgherd_agent::files::herd;
use pgherd_core::retention::{Policy, Retention, Tiers, Unit};
use pgherd_core::spec::backup::{AzureKeyFile, Location, SecretFile, Throttle};
use pgherd_core::spec::hba::HbaLine;
use pgherd_core::spec::parameters;
use pgherd_core::spec::plan::plan;
use pgherd_core::spec::{
    BackupSpec, ClusterSpec, DatabaseSpec, Durability, Format, HerdSpec, NodeSpec, OptionValue, Pool,
    PostgresSource, PostgresSpec, ProxyOption, ProxySpec, ProxyTls, RepositorySpec, Times, TlsMode, VipSpec,
    WitnessSpec,
};
use proptest::prelude::*;

const GOOD: &str = include_str!("../../../../examples/three-hosts.toml");
const BAD: &str = include_str!("../../testdata/files/rules.toml");

/// Every finding can be shown, and its place lies in the text.
fn read_anything(text: &str) {
    let findings = match herd::read("herd.toml", text) {
        Ok(herd) => {
            assert_eq!(herd.spec.check(), [], "a specification that breaks a rule was accepted");
            herd.warnings
        }
        Err(findings) => {
            assert!(findings.errors() > 0, "refused without a reason");
            findings
        }
    };
    for finding in &findings.0 {
        assert!(finding.line >= 1 && finding.line <= text.split('\n').count(), "{finding:?}");
        assert!(finding.column >= 1 && finding.width >= 1, "{finding:?}");
        assert!(!finding.to_string().is_empty());
    }
    serde_json::to_string(&findings).unwrap();
    if let Err(findings) = AgentFile::read("agent.toml", text) {
        assert!(!findings.to_string().is_empty());
    }
}

fn options() -> impl Strategy<Value = Vec<(ProxyOption, OptionValue)>> {
    let all = ProxyOption::ALL.to_vec();
    let values = (prop::sample::subsequence(all, 0..=5), 1u64..=1_000_000, prop::bool::ANY);
    values.prop_map(|(options, number, said)| {
        let value = |option: ProxyOption| match option.default() {
            OptionValue::Switch(_) => OptionValue::Switch(said),
            OptionValue::Whole(_) => OptionValue::Whole(number),
            OptionValue::Time { .. } if said && option.can_be_never() => OptionValue::of_time(None),
            OptionValue::Time { .. } => OptionValue::of_time(Some(Duration::from_millis(number))),
        };
        options.into_iter().map(|option| (option, value(option))).collect()
    })
}

fn pools() -> impl Strategy<Value = BTreeMap<String, Pool>> {
    prop::collection::btree_map("[a-z\"$ ]{1,9}", prop::sample::select(Pool::ALL.to_vec()), 0..3)
}

/// Lines of a good and a bad file, cut and put together anew.
fn shuffled_lines() -> impl Strategy<Value = String> {
    let lines: Vec<&'static str> = GOOD.lines().chain(BAD.lines()).collect();
    prop::collection::vec(prop::sample::select(lines), 0..60).prop_map(|lines| lines.join("\n"))
}

/// A good file with a piece replaced.
fn damaged() -> impl Strategy<Value = String> {
    let pieces = prop::sample::select(vec![
        "", "\"", "=", "[", "]", "[[", "{", "\n", "\u{0}", "ä", "1e999", "\\", "'''",
    ]);
    (0..GOOD.len(), 0..40usize, pieces).prop_map(|(at, length, piece)| {
        let boundary = |mut at: usize| {
            while !GOOD.is_char_boundary(at) {
                at -= 1;
            }
            at
        };
        let (from, to) = (boundary(at), boundary((at + length).min(GOOD.len())));
        format!("{}{piece}{}", &GOOD[..from], &GOOD[to..])
    })
}

/// Some of everything, by a number.
fn tls(number: u32) -> ProxyTls {
    let file = |name: &str, bit: u32| (number & bit != 0).then(|| format!("/etc/some \"dir\"/{name}"));
    let ca_file = file("ca.pem", 8);
    let with_ca = ca_file.is_some();
    let mode = |number: u32, most: usize| TlsMode::ALL[number as usize % most];
    ProxyTls {
        server_mode: mode(number, 6),
        client_mode: mode(number / 3, if with_ca { 6 } else { 4 }),
        client_cert_file: file("cert.pem", 4),
        client_key_file: file("key.pem", 4),
        client_ca_file: ca_file,
        certificate_users: if with_ca { ["anna".to_owned(), "Bob B".to_owned()].into() } else { [].into() },
    }
}

fn spec() -> impl Strategy<Value = HerdSpec> {
    let node = |index: usize| {
        let parameters = prop::sample::subsequence(
            vec![
                ("work_mem", "8MB"),
                ("log_line_prefix", "%m \"[%p]\" \\ '"),
                ("auto_explain.log_nested", "on"),
            ],
            0..=3,
        );
        (1u16..=1000, prop::option::of(1u64..10_000_000), prop::bool::ANY, parameters, 1024u16..2000)
            .prop_map(move |(priority, delay_ms, follow, parameters, port)| NodeSpec {
                port,
                priority,
                // Only an earlier one: no circle. The first stays electable.
                follow: (follow && index > 0).then(|| format!("n{}", index - 1).parse().unwrap()),
                delay: delay_ms.filter(|_| index > 1).map(Duration::from_millis),
                parameters: settings(parameters),
                ..NodeSpec::new(format!("n{index}").parse().unwrap(), format!("192.0.2.{}", index + 1))
            })
    };
    let nodes = prop_oneof![
        (node(0), node(1)).prop_map(|(one, two)| vec![one, two]),
        (node(0), node(1), node(2), node(3)).prop_map(|(one, two, three, four)| vec![one, two, three, four]),
    ];
    let parameters = prop::sample::subsequence(
        vec![
            ("max_connections", "200"),
            ("shared_buffers", "1GB"),
            ("DateStyle", "ISO, DMY"),
            ("jit", "off"),
        ],
        0..=4,
    );
    let durability = prop_oneof![
        Just(Durability::Async),
        prop::option::of(2_000u64..1_000_000).prop_map(|after| Durability::Quorum {
            needed: 1,
            degrade_after: after.map(Duration::from_millis),
        }),
    ];
    let source = prop_oneof![
        (14u16..=18).prop_map(PostgresSource::Version),
        Just(PostgresSource::BinDir("/opt/post \"gres\"/bin".into()))
    ];
    let hba = prop::sample::subsequence(
        vec!["host all all 10.0.0.0/8 scram-sha-256", "hostssl \"a b\" +c,d all md5 # why"],
        0..=2,
    );
    let ident = prop::sample::subsequence(
        vec![
            "people \"CN=Anna,O=Shop\" anna",
            "others /^(.*)@example\\.com$ \\1",
            "x \"a \"\"b\"\"\" \"C d\" # why",
        ],
        0..=3,
    );
    let times = (2_500u64..3_500, 1_900u64..2_100).prop_map(|(lease_ms, election_ms)| Times {
        lease: Duration::from_millis(lease_ms),
        raft_election: Duration::from_millis(election_ms),
        ..Times::default()
    });
    let proxy = prop::option::of(
        (20_000u16..30_000, 30_000u16..40_000, pools(), pools(), 1u32..99, options()).prop_map(
            |(port, read_port, databases, users, pool_size, options)| ProxySpec {
                port,
                read_port,
                pool: users.values().next().copied().unwrap_or(Pool::Transaction),
                pool_size,
                console_admins: databases.keys().cloned().collect(),
                console_readers: users.keys().cloned().collect(),
                tls: tls(pool_size),
                metrics_listen: (pool_size % 2 == 0).then(|| format!("127.0.0.1:{pool_size}")),
                databases,
                users,
                options: options.into_iter().collect(),
            },
        ),
    );
    (
        times,
        nodes,
        parameters,
        durability,
        source,
        (hba, ident),
        proxy,
        prop::option::of(backup()),
        prop::bool::ANY,
    )
        .prop_map(
            |(times, nodes, parameters, durability, source, (hba, ident), proxy, mut backup, more)| {
                if let Some(backup) = &mut backup {
                    let is_directory = matches!(backup.repository.location, Location::Directory(_));
                    backup.voter &= durability != Durability::Async && !is_directory;
                }
                HerdSpec {
                    format: Format,
                    name: "shop".parse().unwrap(),
                    times,
                    clusters: vec![ClusterSpec {
                        name: "main".parse().unwrap(),
                        durability,
                        postgres: PostgresSpec {
                            source,
                            parameters: settings(parameters),
                            hba: hba.into_iter().map(str::to_owned).collect(),
                            ident: ident.into_iter().map(str::to_owned).collect(),
                        },
                        nodes,
                        databases: if more {
                            vec![DatabaseSpec {
                                name: "app-1".parse().unwrap(),
                                owner: "App".parse().unwrap(),
                            }]
                        } else {
                            Vec::new()
                        },
                        proxy,
                        backup,
                        vip: more.then(|| VipSpec {
                            address: "192.0.2.200/24".parse().unwrap(),
                            interface: "bond0.7".to_owned(),
                        }),
                    }],
                    witnesses: if more {
                        vec![WitnessSpec {
                            name: "w".parse().unwrap(),
                            host: "w.example.com".to_owned(),
                            api_port: 8010,
                        }]
                    } else {
                        Vec::new()
                    },
                }
            },
        )
}

fn backup() -> impl Strategy<Value = BackupSpec> {
    let s3 = |endpoint: Option<&str>| Location::S3 {
        url: "s3://bucket/a \"b\"".to_owned(),
        region: endpoint.map(|_| "eu-central-1".to_owned()),
        endpoint: endpoint.map(str::to_owned),
        allow_http: endpoint.is_some(),
        access_key_file: endpoint.map(|_| "/etc/id".into()),
        secret_key_file: endpoint.map(|_| "/etc/key".into()),
    };
    let location = prop_oneof![
        Just(Location::Directory("/srv/back ups".into())),
        Just(s3(None)),
        Just(s3(Some("http://127.0.0.1:9000"))),
        Just(Location::Gcs {
            url: "gs://bucket/shop".to_owned(),
            endpoint: None,
            allow_http: false,
            service_account_file: Some("/etc/account.json".into()),
        }),
        prop_oneof![
            Just(None),
            Just(Some(AzureKeyFile::AccountKey("/etc/account.key".into()))),
            Just(Some(AzureKeyFile::SasToken("/etc/account.sas".into()))),
        ]
        .prop_map(|key| Location::Azure {
            url: "azure://container".to_owned(),
            account: "shop".to_owned(),
            endpoint: Some("http://127.0.0.1:10000/shop".to_owned()),
            allow_http: true,
            key,
        }),
    ];
    let secret = prop::option::of(prop_oneof![
        Just(SecretFile::Passphrase("/etc/pass".into())),
        Just(SecretFile::Key("/etc/key".into())),
    ]);
    let policy = prop::option::of(prop_oneof![
        (1u32..9).prop_map(Policy::Redundancy),
        (1u32..9).prop_map(|count| Policy::Window { count, unit: Unit::Weeks }),
    ]);
    let times = (prop::option::of(1u64..1000), prop::option::of(100u64..10_000));
    (location, secret, policy, prop::bool::ANY, 0u32..3, times).prop_map(
        |(location, secret, policy, scheduled, count, (age_h, interval_ms))| BackupSpec {
            repository: RepositorySpec { location, secret },
            schedule: scheduled.then(|| "*/5 1-3 * * mon".to_owned()),
            retention: Retention {
                policy,
                minimum_redundancy: count,
                tiers: Tiers { daily: count, weekly: 0, monthly: count * 2 },
            },
            maximum_age: age_h.map(|hours| Duration::from_secs(hours * 3600)),
            archive_interval: interval_ms.map(Duration::from_millis),
            throttle: match count {
                0 => Throttle::ByItself,
                1 => Throttle::Never,
                mib => NonZeroU32::new(mib).map_or(Throttle::Never, Throttle::DownToMib),
            },
            drill: (count > 0).then(|| "0 4 * * 7".to_owned()),
            drill_dir: (count > 1).then(|| "/srv/drill".into()),
            drill_queries: (0..count).map(|number| format!("app=SELECT \"it's\" > {number}")).collect(),
            voter: scheduled,
        },
    )
}

fn settings(pairs: Vec<(&str, &str)>) -> BTreeMap<String, String> {
    pairs.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// What passes here must not be refused by the driver of PostgreSQL, where nobody is asked any more.
#[test]
fn the_driver_takes_every_parameter_that_is_allowed() {
    let mut allowed = 0;
    for (name, rows) in parameters::table() {
        let words = rows.iter().flat_map(|row| match &row.kind {
            parameters::Kind::Enum(words) => words.clone(),
            _ => vec!["on", "off", "0", "1", "16", "100MB", "10s", "0.5", "some text"],
        });
        for word in words {
            if parameters::check(name, word, None).is_ok() {
                allowed += 1;
                let one = settings(vec![(name, word)]);
                let refused = pgherd_postgres::conf::check_parameters(&one);
                assert!(refused.is_empty(), "{name} = {word}: {refused:?}");
            }
        }
    }
    assert!(allowed > 300, "only {allowed} settings were allowed");
}

/// A line of words that mean something somewhere.
fn hba_line() -> impl Strategy<Value = String> {
    let word = prop::sample::select(vec![
        "local",
        "host",
        "hostssl",
        "all",
        "app",
        "a,b",
        "\"a b\"",
        "+admins",
        "replication",
        "samenet",
        "10.0.0.0/8",
        "10.0.0.0",
        "255.0.0.0",
        "::1/128",
        "db.example.com",
        "scram-sha-256",
        "md5",
        "cert",
        "peer",
        "reject",
        "trust",
        "ldap",
        "ldapserver=x",
        "clientcert=verify-full",
        ",",
        "#",
        "\"",
        "pam",
    ]);
    let blank = prop::sample::select(vec![" ", "\t", "  ", ""]);
    let likely = ["host", "hostssl", "local"].map(|kind| format!("{kind} all all "));
    let begin = prop_oneof![Just(String::new()), prop::sample::select(likely.to_vec())];
    (begin, prop::collection::vec((word, blank), 0..7))
        .prop_map(|(begin, words)| words.into_iter().fold(begin, |line, (word, blank)| line + word + blank))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn the_driver_takes_every_line_that_is_allowed(line in hba_line()) {
        if HbaLine::parse(&line, None).is_ok() {
            let refused = pgherd_postgres::hba::check_line(&line);
            prop_assert!(refused.is_ok(), "{}: {:?}", line, refused);
        }
    }
}

proptest! {
    #[test]
    fn any_text_is_read_to_an_end(text in "(?s).{0,200}") {
        read_anything(&text);
    }

    #[test]
    fn any_order_of_lines_is_read_to_an_end(text in shuffled_lines()) {
        read_anything(&text);
    }

    #[test]
    fn any_damage_is_read_to_an_end(text in damaged()) {
        read_anything(&text);
    }

    #[test]
    fn what_is_written_is_read_back(spec in spec()) {
        prop_assert_eq!(spec.check(), []);
        let text = herd::write(&spec);
        match herd::read("herd.toml", &text) {
            Ok(herd) => prop_assert_eq!(herd.spec, spec),
            Err(findings) => prop_assert!(false, "{}\n{}", text, findings),
        }
    }

    #[test]
    fn what_is_stored_is_read_back(spec in spec()) {
        let stored = serde_json::to_string(&spec).unwrap();
        prop_assert_eq!(serde_json::from_str::<HerdSpec>(&stored).unwrap(), spec);
    }

    #[test]
    fn every_change_has_a_plan(old in spec(), new in spec(), primary in prop::option::of("n[0-3]")) {
        let same = plan(&old, &old, |_| None);
        prop_assert!(same.is_empty(), "{}", same);
        let plan = plan(&old, &new, |_| primary.as_ref().map(|name| name.parse().unwrap()));
        prop_assert_eq!(plan.is_empty(), old == new, "{}", plan);
        prop_assert!(!plan.to_string().is_empty());
    }
}

/// A specification of the first format, as the first release stores it, stays readable.
#[test]
fn the_first_stored_format_is_read() {
    let stored = include_str!("../../testdata/spec-format-1.json");
    let spec: HerdSpec = serde_json::from_str(stored).unwrap();
    assert_eq!(spec.check(), []);
    assert_eq!(spec.clusters[0].nodes[2].priority, 50);
    assert_eq!(
        serde_json::to_value(&spec).unwrap(),
        serde_json::from_str::<serde_json::Value>(stored).unwrap()
    );

    let later = stored.replacen("\"format\": 1", "\"format\": 2", 1);
    let refused = serde_json::from_str::<HerdSpec>(&later).unwrap_err().to_string();
    assert!(refused.contains("stored in format 2, this program reads format 1"), "{refused}");
}

/// Deeply nested text must not exhaust the stack.
#[test]
fn depth_and_length_have_limits() {
    for open in ["[", "{", "a.", "a={", "[["] {
        read_anything(&open.repeat(50_000));
        read_anything(&format!("a = {}", open.repeat(50_000)));
    }
    read_anything(&"a".repeat(2 << 20));
    read_anything(&format!("[cluster{}]", ".a".repeat(50_000)));
}

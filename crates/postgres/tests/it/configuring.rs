//! Configuration that PostgreSQL judges, the gate, roles and their passwords.

use std::time::{Duration, SystemTime};

use pgherd_postgres::Instance;
use pgherd_postgres::conf::{self, ConfError, Settings};
use pgherd_postgres::control::ControlFile;
use pgherd_postgres::hba::{self, Gate, Rules};
use pgherd_postgres::process::StopMode;
use pgherd_postgres::roles::{self, AppDatabase};
use pgherd_postgres::secret::{Secret, Verifier};
use pgherd_postgres::sql::Session;

use crate::harness::{Authority, Herd, SOON, ask, authority, settings, start, story, superuser, until};

story! {
    async fn postgresql_judges_a_configuration_before_it_is_written() {
        let herd = Herd::new().await;
        let instance = herd.node("a").await;
        let with = |name: &str, value: &str| {
            let mut settings = settings();
            settings.parameters.insert(name.into(), value.into());
            settings
        };
        for (name, value, complaint) in [
            ("work_memm", "64MB", "unrecognized configuration parameter \"work_memm\""),
            ("work_mem", "64 potatoes", "invalid value for parameter \"work_mem\""),
            ("max_connections", "-5", "outside the valid range"),
            ("log_statement", "everything", "invalid value for parameter \"log_statement\""),
        ] {
            let text = conf::generate(&instance, &with(name, value)).unwrap().0;
            let Err(ConfError::Rejected { complaints }) = conf::validate(&instance, &text).await else {
                panic!("{name} = {value} was accepted");
            };
            assert!(complaints.iter().any(|said| said.contains(complaint)), "{complaints:?}");
        }
        let text = conf::generate(&instance, &with("work_mem", "64MB")).unwrap().0;
        conf::validate(&instance, &text).await.unwrap();
    }
}

story! {
    async fn changes_are_loaded_marked_pending_or_reported_as_overridden() {
        let herd = Herd::new().await;
        let server = herd.initialized("a").await;
        let instance = server.instance();
        let mut settings = settings();
        settings.parameters.insert("work_mem".into(), "5MB".into());
        settings.parameters.insert("max_connections".into(), "50".into());
        let control = ControlFile::read(&instance.control_file()).unwrap();
        settings.at_least = Some(control.limits);
        let (changed, raised) = conf::write(instance, &settings).await.unwrap();
        assert!(changed);
        assert_eq!((raised[0].name, raised[0].asked, raised[0].kept), ("max_connections", 50, 100));
        assert!(!conf::write(instance, &settings).await.unwrap().0, "nothing to write the second time");

        settings.parameters.insert("max_connections".into(), "120".into());
        conf::write(instance, &settings).await.unwrap();
        server.reload().unwrap();
        let session = superuser(instance).await;
        until("it was loaded", async || (ask(&session, "SHOW work_mem").await == "5MB").then_some(())).await;
        let pending = ask(&session, "SELECT string_agg(name, ',') FROM pg_settings WHERE pending_restart").await;
        assert_eq!(pending, "max_connections");

        assert_eq!(conf::overrides(instance).await.unwrap(), []);
        ask(&session, "ALTER SYSTEM SET work_mem = '7MB'").await;
        ask(&session, "ALTER SYSTEM SET primary_conninfo = 'host=elsewhere'").await;
        ask(&session, "ALTER SYSTEM SET cursor_tuple_fraction = '0.5'").await;
        let found = conf::overrides(instance).await.unwrap();
        let short: Vec<_> = found.iter().map(|it| (it.name.as_str(), it.value.as_str(), it.critical)).collect();
        assert_eq!(short, [("primary_conninfo", "host=elsewhere", true), ("work_mem", "7MB", false)]);

        // What safety rests on cannot be changed at all.
        ask(&session, "ALTER SYSTEM SET restart_after_crash = on").await;
        ask(&session, "SELECT pg_reload_conf()").await;
        until("it was loaded", async || (ask(&session, "SHOW work_mem").await == "7MB").then_some(())).await;
        assert_eq!(ask(&session, "SHOW restart_after_crash").await, "off");
        assert_eq!(ask(&session, "SHOW ssl").await, "on");
    }
}

story! {
    async fn the_gate_lets_in_whom_it_should() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &[]).await;
        let instance = nodes[0].instance();
        let password = Secret::new("a: quoted \\ pass'word");
        let app = AppDatabase {
            database: "shop".into(),
            owner: "app".into(),
            password: Some(Verifier::of(&password)),
        };
        let session = superuser(instance).await;
        roles::ensure_app(&session, &app, SOON).await.unwrap();
        roles::ensure_app(&session, &app, SOON).await.unwrap();
        roles::ensure_own(&session, &herd.own_roles(), SOON).await.unwrap();
        assert_eq!(ask(&superuser(instance).await, "SELECT rolsuper OR rolreplication FROM pg_roles WHERE rolname = 'app'").await, "f");

        let lines = vec!["host all all 127.0.0.1/32 scram-sha-256".to_owned()];
        let rules = Rules { lines, ..Rules::default() };
        let as_app = async |password: &Secret| {
            let remote = herd.remote(instance, "app", password).await;
            Session::remote(&remote, SOON).await
        };
        assert!(as_app(&password).await.is_err(), "the gate is closed");
        let switch = async |gate: Gate| {
            let asked = SystemTime::now();
            assert!(hba::write(instance, gate, &rules).await.unwrap());
            nodes[0].server.reload().unwrap();
            until("the gate has moved", async || {
                hba::verify(&superuser(instance).await, asked, SOON).await.ok()
            })
            .await;
            assert_eq!(hba::written(instance).await.unwrap(), Some(gate));
        };
        switch(Gate::Open).await;
        as_app(&password).await.unwrap();
        assert!(as_app(&Secret::new("wrong")).await.is_err());
        for ours in [roles::REPLICATION, roles::REWIND] {
            let remote = herd.remote(instance, ours, &Secret::new("wrong")).await;
            assert!(Session::remote(&remote, SOON).await.is_err());
        }
        switch(Gate::Closed).await;
        assert!(as_app(&password).await.is_err());

        // Neither passwords nor verifiers in any log.
        let stored = ask(&superuser(instance).await, "SELECT string_agg(rolpassword, ' ') FROM pg_authid").await;
        for log in std::fs::read_dir(&instance.log_dir).unwrap().flatten() {
            let text = std::fs::read_to_string(log.path()).unwrap();
            assert!(!text.contains("SCRAM-SHA-256$") && !text.contains("pass'word"));
        }
        assert!(stored.contains(app.password.unwrap().as_str()));
    }
}

story! {
    async fn a_proxy_comes_in_by_its_certificate_and_reads_verifiers_and_nothing_else() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let session = nodes[0].session().await;
        session.batch_execute("CREATE TABLE t (i int); CREATE ROLE app LOGIN PASSWORD 'x'; CREATE ROLE proxied LOGIN").await.unwrap();
        let position = nodes[0].session().await;
        let position = ask(&position, "SELECT pg_current_wal_flush_lsn()").await;
        until("the standby has it", async || {
            let replayed = format!("SELECT pg_last_wal_replay_lsn() >= '{position}'");
            (ask(&nodes[1].session().await, &replayed).await == "t").then_some(())
        })
        .await;
        let stranger = authority();
        let enter = async |instance: &Instance, role: &str, name: &str, ca: &Authority| {
            Session::remote(&herd.certified(instance, role, name, ca).await, SOON).await
        };
        for gate in [Gate::Closed, Gate::Open] {
            for node in &nodes {
                let instance = node.instance();
                let lines = vec!["hostssl all all 127.0.0.1/32 cert".to_owned()];
                let rules = Rules { lines, through_proxies: vec!["proxied".to_owned()], ..Rules::default() };
                hba::set(&node.server, gate, &rules, SOON).await.unwrap();
                for name in ["pgherd:proxy/up", &format!("pgherd:proxy/{}", "x".repeat(48))] {
                    let proxy = enter(instance, roles::PROXY, name, &herd.ca).await.unwrap();
                    let query = "SELECT rolpassword FROM pg_catalog.pg_authid WHERE rolname = 'app' AND rolcanlogin \
                                 AND rolvaliduntil IS NULL";
                    assert!(ask(&proxy, query).await.starts_with("SCRAM-SHA-256$"), "{gate:?}");
                    for refused in [
                        "SELECT oid FROM pg_catalog.pg_authid",
                        "SELECT rolsuper FROM pg_catalog.pg_authid",
                        "SELECT * FROM pg_catalog.pg_authid",
                        "SELECT passwd FROM pg_catalog.pg_shadow",
                        "SELECT pg_catalog.pg_read_file('pg_hba.conf')",
                        "SELECT * FROM pg_catalog.pg_statistic",
                        "SELECT i FROM public.t",
                        "SET ROLE app",
                        "SET SESSION AUTHORIZATION postgres",
                    ] {
                        let error = proxy.batch_execute(refused).await.expect_err(refused);
                        let code = error.code().map(|code| code.code().to_owned());
                        assert_eq!(code.as_deref(), Some("42501"), "{refused}: {error:?}");
                    }
                }
                for (name, ca, why) in [
                    ("pgherd:proxy/up", &stranger, "another CA's"),
                    ("a", &herd.ca, "a node's"),
                    ("operator:anna", &herd.ca, "an operator's"),
                    ("pgherd_proxy", &herd.ca, "one named like the role"),
                    ("x/pgherd:proxy/y", &herd.ca, "one that ends like a proxy's"),
                    ("pgherd:proxy/y/z", &herd.ca, "one that begins like a proxy's"),
                    ("pgherd:proxy/y\n", &herd.ca, "one with a line of its own"),
                    ("x\npgherd:proxy/y", &herd.ca, "one with a line of its own before"),
                    ("pgherd:proxy/", &herd.ca, "one without a name"),
                ] {
                    let refused = enter(instance, roles::PROXY, name, ca).await;
                    assert!(refused.is_err(), "{why} comes in with the gate {gate:?}");
                }
                for role in ["postgres", roles::MONITOR, roles::REPLICATION, roles::REWIND, "app"] {
                    let refused = enter(instance, role, "pgherd:proxy/up", &herd.ca).await;
                    assert!(refused.is_err(), "a proxy comes in as {role} with the gate {gate:?}");
                }
                let proxied = enter(instance, "proxied", "pgherd:proxy/up", &herd.ca).await;
                assert_eq!(proxied.is_ok(), gate == Gate::Open, "{gate:?}");
                for (name, ca) in [("proxied", &herd.ca), ("a", &herd.ca), ("pgherd:proxy/up", &stranger)] {
                    let refused = enter(instance, "proxied", name, ca).await;
                    assert!(refused.is_err(), "{name} comes in as a role that is for proxies with the gate {gate:?}");
                }
                assert!(Session::local(instance, roles::PROXY, SOON).await.is_err(), "by the socket");
            }
        }
    }
}

story! {
    async fn a_herd_that_was_made_before_there_were_proxies_gets_their_role() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let session = nodes[0].session().await;
        let remove = format!("DROP OWNED BY {0}; DROP ROLE {0}", roles::PROXY);
        session.batch_execute(&remove).await.unwrap();
        let ends = async |session: &Session| ask(session, "SELECT pg_current_wal_insert_lsn()").await;
        assert!(roles::ensure_proxy(&nodes[0].session().await, SOON).await.unwrap(), "it was missing");
        assert!(!roles::ensure_proxy(&nodes[0].session().await, SOON).await.unwrap(), "and is there now");

        // What somebody changed about it is put right.
        for wrong in [
            "ALTER ROLE pgherd_proxy PASSWORD 'x'",
            "ALTER ROLE pgherd_proxy NOLOGIN",
            "ALTER ROLE pgherd_proxy CREATEROLE",
            "REVOKE SELECT (rolvaliduntil) ON pg_authid FROM pgherd_proxy",
        ] {
            session.batch_execute(wrong).await.unwrap();
            assert!(roles::ensure_proxy(&nodes[0].session().await, SOON).await.unwrap(), "{wrong}");
            assert!(!roles::ensure_proxy(&nodes[0].session().await, SOON).await.unwrap(), "{wrong}");
        }

        // A standby that was cloned before it was made has it too, and as a primary.
        let b = nodes[1].instance();
        let position = ends(&session).await;
        until("the standby has it", async || {
            let replayed = format!("SELECT pg_last_wal_replay_lsn() >= '{position}'");
            (ask(&nodes[1].session().await, &replayed).await == "t").then_some(())
        })
        .await;
        let as_proxy = herd.certified(b, roles::PROXY, "pgherd:proxy/up", &herd.ca).await;
        Session::remote(&as_proxy, SOON).await.unwrap();
        nodes[0].server.stop(StopMode::Fast, SOON).await.unwrap();
        let order = pgherd_postgres::promote::Order {
            timeline: pgherd_core::types::Timeline(3),
            at_least: Default::default(),
            names: conf::SyncNames::Empty,
        };
        pgherd_postgres::promote::promote(&nodes[1].server, &order, SOON).await.unwrap();
        assert!(!roles::ensure_proxy(&nodes[1].session().await, SOON).await.unwrap());
        Session::remote(&as_proxy, SOON).await.unwrap();
    }
}

story! {
    async fn verifiers_stay_out_of_a_log_that_logs_everything() {
        let herd = Herd::new().await;
        let instance = herd.node("a").await;
        let mut noisy = settings();
        for (name, value) in [("log_statement", "all"), ("log_min_duration_statement", "0"), ("log_connections", "on")] {
            noisy.parameters.insert(name.into(), value.into());
        }
        pgherd_postgres::initdb::initdb(&instance, &noisy, &herd.secrets.superuser, SOON).await.unwrap();
        let server = start(&instance).await;
        let order = pgherd_postgres::promote::Order {
            timeline: pgherd_core::types::Timeline(2),
            at_least: Default::default(),
            names: conf::SyncNames::Empty,
        };
        pgherd_postgres::promote::promote(&server, &order, SOON).await.unwrap();
        roles::ensure_own(&superuser(&instance).await, &herd.own_roles(), SOON).await.unwrap();
        server.stop(StopMode::Fast, SOON).await.unwrap();
        let mut logged = String::new();
        for log in std::fs::read_dir(&instance.log_dir).unwrap().flatten() {
            logged.push_str(&std::fs::read_to_string(log.path()).unwrap());
        }
        assert!(logged.contains("connection authorized"), "it does log");
        assert!(!logged.contains("SCRAM-SHA-256$"), "{logged}");
        assert_eq!(Settings::default().apply_delay, None::<Duration>);
    }
}

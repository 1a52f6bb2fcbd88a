//! Configuration that PostgreSQL judges, the gate, roles and their passwords.

use std::time::{Duration, SystemTime};

use pgherd_postgres::conf::{self, ConfError, Settings};
use pgherd_postgres::control::ControlFile;
use pgherd_postgres::hba::{self, Gate};
use pgherd_postgres::process::StopMode;
use pgherd_postgres::roles::{self, AppDatabase};
use pgherd_postgres::secret::{Secret, Verifier};
use pgherd_postgres::sql::Session;

use crate::harness::{Herd, SOON, ask, settings, start, story, superuser, until};

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
        let as_app = async |password: &Secret| {
            let remote = herd.remote(instance, "app", password).await;
            Session::remote(&remote, SOON).await
        };
        assert!(as_app(&password).await.is_err(), "the gate is closed");
        let switch = async |gate: Gate| {
            let asked = SystemTime::now();
            assert!(hba::write(instance, gate, &lines).await.unwrap());
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

//! One look at a server, heartbeats and their cancelled waits, slots, and the list proven in force.

use std::time::Duration;

use pgherd_core::types::{Lsn, Timeline};
use pgherd_postgres::conf::SyncNames;
use pgherd_postgres::disk::{DiskProbe, space};
use pgherd_postgres::observe::{Beat, Heart, Monitor, Probe, Target, marker};
use pgherd_postgres::process::StopMode;
use pgherd_postgres::slots::{self, SlotError};
use pgherd_postgres::{Error, logs, roles, sync_names};

use crate::harness::{Herd, SOON, ask, member, story, superuser, until};

story! {
    async fn one_look_tells_who_streams_by_what_name_certificate_and_slot() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let [a, b] = &nodes[..] else { unreachable!() };
        let local = |node: &crate::harness::Node| Target::Local {
            instance: node.instance().clone(),
            role: roles::MONITOR.to_owned(),
        };
        let mut on_a = Monitor::new(local(a));
        let view = on_a.view(SOON).await.unwrap();
        assert!(!view.in_recovery && view.receiver.is_none());
        assert_eq!(view.timeline, Timeline(2));
        assert!(view.flush_lsn.unwrap() > Lsn(0));
        let [sender] = &view.senders[..] else { panic!("{view:?}") };
        assert_eq!(sender.application_name, "b_1.2");
        assert_eq!(sender.client_dn.as_deref(), Some("/CN=b"));
        assert_eq!(sender.slot.as_deref(), Some("b_1"));
        assert_eq!((sender.sync_state.as_deref(), sender.sync_priority), (Some("quorum"), Some(1)));
        assert_eq!(view.slots[0].wal_status, Some(slots::WalStatus::Reserved));

        // Over TLS, as another node's monitor.
        let remote = herd.remote(b.instance(), roles::MONITOR, &herd.secrets.monitor).await;
        let mut on_b = Monitor::new(Target::Remote(Box::new(remote.clone())));
        let view_b = on_b.view(SOON).await.unwrap();
        assert!(view_b.in_recovery && view_b.system_id == view.system_id);
        let receiver = view_b.receiver.unwrap();
        assert_eq!(receiver.status.as_deref(), Some("streaming"));
        assert_eq!(receiver.timeline, Some(Timeline(2)));
        assert!(matches!(on_b.probe(SOON).await.unwrap(), Probe::Answered { .. }));

        // A server that shows another's certificate is not believed.
        let posing = pgherd_postgres::sql::Remote { host: "a".into(), ..remote };
        let refused = Monitor::new(Target::Remote(Box::new(posing))).view(SOON).await;
        assert!(matches!(refused, Err(Error::Connect { .. })), "{refused:?}");

        // A standing session that broke is noticed and replaced.
        let ended = superuser(b.instance()).await;
        ask(&ended, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'pgherd_monitor'").await;
        until("the probe uses a new session", async || {
            matches!(on_b.probe(SOON).await.unwrap(), Probe::AnsweredAnew { .. }).then_some(())
        })
        .await;

        // A frozen one, too.
        let postmaster = rustix::process::Pid::from_raw(b.server.pid()).unwrap();
        rustix::process::kill_process(postmaster, rustix::process::Signal::STOP).unwrap();
        assert!(on_b.probe_new(Duration::from_millis(500)).await.is_err());
        rustix::process::kill_process(postmaster, rustix::process::Signal::CONT).unwrap();
    }
}

story! {
    async fn a_heartbeat_waits_for_voters_and_one_that_was_cancelled_is_not_acknowledged() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let [a, b] = &nodes[..] else { unreachable!() };
        let target = Target::Local { instance: a.instance().clone(), role: roles::MONITOR.to_owned() };
        let mut heart = Heart::new(target);
        assert!(matches!(heart.beat(SOON).await.unwrap(), Beat::Acknowledged { .. }));

        b.server.stop(StopMode::Kill, SOON).await.unwrap();
        let late = heart.beat(Duration::from_millis(300)).await;
        assert!(matches!(late, Err(Error::Deadline { .. })));
        let asked = heart.pending_since().unwrap();
        assert!(heart.beat(Duration::from_millis(50)).await.is_err());
        assert_eq!(heart.pending_since(), Some(asked), "still the same one");

        // A marker needs no standby.
        let session = a.session().await;
        let before: Lsn = ask(&session, "SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
        assert!(marker(&session, "rule 7", SOON).await.unwrap() > before);

        let cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        until("the heartbeat's wait is cancelled", async || (ask(&session, cancel).await == "t").then_some(())).await;
        assert_eq!(heart.beat(SOON).await.unwrap(), Beat::Cancelled);

        // With its standby back, the next one is acknowledged.
        crate::harness::start(b.instance()).await;
        assert!(matches!(heart.beat(SOON).await.unwrap(), Beat::Acknowledged { .. }));
    }
}

story! {
    async fn an_empty_list_that_is_filled_while_the_checkpointer_is_stalled_is_not_proven() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &[]).await;
        let a = &nodes[0];
        sync_names::set(a.instance(), Some(&a.server), &SyncNames::Empty).await.unwrap();
        sync_names::prove(&a.server, &SyncNames::Empty, SOON).await.unwrap();
        let session = a.session().await;
        let query = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'";
        let checkpointer = ask(&session, query).await.parse().unwrap();
        let checkpointer = rustix::process::Pid::from_raw(checkpointer).unwrap();
        rustix::process::kill_process(checkpointer, rustix::process::Signal::STOP).unwrap();

        sync_names::set(a.instance(), Some(&a.server), &SyncNames::Nobody).await.unwrap();
        let unproven = sync_names::prove(&a.server, &SyncNames::Nobody, Duration::from_millis(500)).await;
        assert!(unproven.is_err());
        // And rightly so: new sessions show the list, and a commit returns at once.
        let shown = ask(&superuser(a.instance()).await, "SHOW synchronous_standby_names").await;
        assert_eq!(shown, SyncNames::Nobody.to_string());
        let unheard = superuser(a.instance()).await;
        let passed = ask(&unheard, "SELECT pg_logical_emit_message(true, 'x', 'y')");
        tokio::time::timeout(SOON, passed).await.expect("the commit waited, so that this test shows nothing");

        rustix::process::kill_process(checkpointer, rustix::process::Signal::CONT).unwrap();
        sync_names::prove(&a.server, &SyncNames::Nobody, SOON).await.unwrap();
        let session = superuser(a.instance()).await;
        let waits = ask(&session, "SELECT pg_logical_emit_message(true, 'x', 'y')");
        assert!(tokio::time::timeout(Duration::from_millis(500), waits).await.is_err(), "proven, so it waits");
    }
}

story! {
    async fn slots_of_members_come_and_go_and_those_of_others_stay() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let [a, b] = &nodes[..] else { unreachable!() };
        let names = ["a".parse().unwrap(), "b".parse().unwrap(), "c".parse().unwrap()];
        let session = a.session().await;
        ask(&session, "SELECT pg_create_physical_replication_slot('barman')").await;
        assert!(slots::ensure(&session, &member("c", 3), SOON).await.unwrap());
        assert!(!slots::ensure(&session, &member("c", 3), SOON).await.unwrap());
        let listed = slots::list(&session, &names, SOON).await.unwrap();
        let described: Vec<_> = listed.iter().map(|slot| (slot.name.as_str(), slot.member.is_some())).collect();
        assert_eq!(described, [("b_1", true), ("barman", false), ("c_3", true)]);

        assert!(matches!(slots::drop(&session, "barman", &names, SOON).await, Err(SlotError::Foreign { .. })));
        assert!(matches!(slots::drop(&session, "b_1", &names, SOON).await, Err(SlotError::Active { .. })));
        assert!(slots::drop(&session, "c_3", &names, SOON).await.unwrap());
        assert!(!slots::drop(&session, "c_3", &names, SOON).await.unwrap());

        // On a standby, a slot for the day when it leads; it is moved along and never back.
        let on_b = b.session().await;
        slots::ensure(&on_b, &member("c", 4), SOON).await.unwrap();
        let sent = marker(&session, "x", SOON).await.unwrap();
        until("b has it", async || {
            let replayed: Lsn = ask(&on_b, "SELECT pg_last_wal_replay_lsn()").await.parse().unwrap();
            (replayed >= sent).then_some(())
        })
        .await;
        let stands = slots::advance(&on_b, &member("c", 4), sent, SOON).await.unwrap();
        assert_eq!(stands, sent);
        assert_eq!(slots::advance(&on_b, &member("c", 4), Lsn(1), SOON).await.unwrap(), sent);
        assert!(matches!(slots::advance(&on_b, &member("c", 9), sent, SOON).await, Err(SlotError::Missing { .. })));
    }
}

story! {
    async fn a_standby_keeps_slots_for_whoever_may_be_pointed_at_it() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let [a, b] = &nodes[..] else { unreachable!() };
        let names = ["a".parse().unwrap(), "b".parse().unwrap(), "c".parse().unwrap()];
        let (session, on_b) = (a.session().await, b.session().await);
        let described = async || {
            let listed = slots::list(&on_b, &names, SOON).await.unwrap();
            listed.into_iter().map(|slot| (slot.name, slot.restart_lsn)).collect::<Vec<_>>()
        };
        ask(&on_b, "SELECT pg_create_physical_replication_slot('barman')").await;
        slots::ensure(&on_b, &member("c", 2), SOON).await.unwrap();

        // Nobody knows yet what they have: the slots are there, and hold everything from now on.
        slots::keep(&on_b, &[(member("a", 1), None), (member("c", 3), None)], &names, SOON).await.unwrap();
        let before = described().await;
        let kept: Vec<&str> = before.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(kept, ["a_1", "barman", "c_3"], "a former incarnation's slot would hold WAL for nobody");
        assert!(before[0].1.is_some() && before[2].1.is_some(), "{before:?}");

        // What c has, it needs no more; what a has is not known, and stays.
        let sent = marker(&session, "x", SOON).await.unwrap();
        until("b has it", async || {
            let replayed: Lsn = ask(&on_b, "SELECT pg_last_wal_replay_lsn()").await.parse().unwrap();
            (replayed >= sent).then_some(())
        })
        .await;
        slots::keep(&on_b, &[(member("a", 1), None), (member("c", 3), Some(sent))], &names, SOON).await.unwrap();
        let after = described().await;
        assert_eq!((after[0].1, after[2].1), (before[0].1, Some(sent)));
        slots::keep(&on_b, &[(member("c", 3), Some(Lsn(1)))], &names, SOON).await.unwrap();
        assert_eq!(described().await, after, "no slot goes back, and one that is not spoken of stays");
    }
}

story! {
    async fn the_disk_is_probed_and_the_log_is_read() {
        let herd = Herd::new().await;
        let server = herd.initialized("a").await;
        let instance = server.instance();
        let probe = DiskProbe::new(&instance.pg_wal());
        assert!(probe.probe(SOON).await.unwrap() < SOON);
        assert!(space(&instance.pg_wal()).unwrap().total_bytes > 0);

        ask(&superuser(instance).await, "DO $$ BEGIN RAISE LOG 'a line to look for'; END $$").await;
        let piece = until("the line is in the log", async || {
            let piece = logs::tail(instance, 5).await.unwrap()?;
            piece.text.contains("a line to look for").then_some(piece)
        })
        .await;
        assert!(piece.text.lines().count() <= 5);
        ask(&superuser(instance).await, "DO $$ BEGIN RAISE LOG 'and another'; END $$").await;
        let mut position = piece.next;
        until("the next line follows", async || {
            let piece = logs::since(instance, position.clone()).await.unwrap();
            position = piece.next;
            piece.text.contains("and another").then_some(())
        })
        .await;
        assert_eq!(logs::prune(instance, 0, Duration::ZERO).await.unwrap(), 0, "never the newest");
    }
}

//! A receiver that is killed at any moment, while the server is written to.

use std::process::Stdio;
use std::time::{Duration, Instant};

use pgherd_agent::archive::Archiving;
use pgherd_core::types::{Lsn, Timeline};
use pgherd_postgres::roles;

use crate::harness::{ask, story, until};
use crate::scene::{SEGMENT_BYTES, SLOT, Scene, durable, fill};

const DEATHS: u32 = 12;

story! {
    async fn case_01_02_a_receiver_is_killed_under_load_and_the_archive_is_what_the_server_wrote() {
        let scene = Scene::new(&[]).await;
        let node = scene.nodes[0].instance().clone();
        let pgbench = |arguments: &[&str]| {
            let mut command = tokio::process::Command::new(node.installation.program("pgbench"));
            command.args(["-h", &node.socket_dir.display().to_string(), "-p", &node.port.to_string()]);
            command.args(["-U", roles::SUPERUSER]).args(arguments).arg("postgres");
            command.stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
            command
        };
        let order = scene.order(0).await;
        assert!(pgbench(&["-i", "-q", "-s", "3"]).status().await.unwrap().success());
        let mut load = pgbench(&["-n", "-c", "2", "-T", "120"]).spawn().unwrap();

        let session = scene.nodes[0].session().await;
        let restart = format!("SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = '{SLOT}'");
        let first: Lsn = ask(&session, &restart).await.parse().unwrap();
        let first = first.0 / SEGMENT_BYTES;
        let mut seed = 20_261_122_u64;
        for death in 0..DEATHS {
            // A life on threads of its own, which are left behind wherever they are.
            let life = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            let archiving = life.spawn({
                let order = order.clone();
                async move { Archiving::begin(order) }
            });
            let archiving = archiving.await.unwrap();
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let lives = Duration::from_millis(seed >> 33 & 0x1FF);
            let begun = Instant::now();
            while begun.elapsed() < lives {
                // More than the load alone writes in so short a time.
                ask(&session, "SELECT pg_switch_wal()").await;
                // sleep: how long it lives is what is tried.
                tokio::time::sleep(Duration::from_millis(40)).await;
            }
            life.shutdown_background();
            drop(archiving);
            // What the server may forget is in the archive, every time.
            let reported: Lsn = ask(&session, &restart).await.parse().unwrap();
            let inventory = scene.inventory().await;
            let behind = reported.0 / SEGMENT_BYTES;
            assert!(
                Scene::has_all(&inventory, Timeline(2), first, behind),
                "death {death}: {reported} was reported"
            );
        }
        load.kill().await.unwrap();
        let end = fill(&session).await;
        let archiving = Archiving::begin(order);
        durable(&archiving, end).await;
        until("it is reported", async || {
            let reported: Lsn = ask(&session, &restart).await.parse().unwrap();
            (reported >= end).then_some(())
        })
        .await;
        let status = archiving.status();
        archiving.end().await;
        assert_eq!(status.borrow().state, pgherd_agent::archive::State::Ended);
        let last = end.0 / SEGMENT_BYTES;
        assert!(Scene::has_all(&scene.inventory().await, Timeline(2), first, last));
        let compared = scene.compare(0, Timeline(2)).await;
        assert_eq!(compared.len() as u64, last - first, "all of them are compared");
        eprintln!("{DEATHS} deaths, {} segments compared", compared.len());
    }
}

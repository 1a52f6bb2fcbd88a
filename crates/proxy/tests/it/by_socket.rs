//! A server on the same host is reached over its Unix socket, and over TCP wherever that is not the right way.

use std::path::Path;

use pgherd_proxy::routes::{Table, Target};

use crate::harness::{Scene, connect, one, settings, story, told, until};

const OVER_TCP: &str = "host all all 127.0.0.1/32 scram-sha-256\n";
const BOTH: &str = "local all all scram-sha-256\nhost all all 127.0.0.1/32 scram-sha-256\n";

/// From now on the server is node `node`, with a socket in this directory.
fn route(scene: &Scene, term: u64, node: &str, socket_dir: &Path) {
    let table = scene.table(term, Some(node));
    let primary = table.primary.map(|primary| Target { socket_dir: Some(socket_dir.to_owned()), ..primary });
    assert!(scene.proxy.learn(Table { primary, ..table }));
}

async fn admit(scene: &Scene, lines: &str) {
    let admins = "host all,replication postgres,pgherd_proxy 127.0.0.1/32 trust\n";
    let admin = scene.admin().await;
    let asked = one(&admin, "SELECT clock_timestamp()").await;
    scene.server.admit(&format!("{admins}{lines}"));
    admin.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    let loaded = format!("SELECT pg_conf_load_time() >= '{asked}'");
    // A session that has begun later was let in by these lines.
    until("the lines are in force", async || one(&scene.admin().await, &loaded).await == "t").await;
}

/// Where the server sees a client of the proxy come from.
async fn seen(conninfo: &str) -> String {
    let client = connect(conninfo).await.unwrap();
    one(&client, "SELECT coalesce(host(inet_client_addr()), 'socket')").await
}

story! {
    async fn a_server_on_this_host_is_reached_over_its_socket(scene) {
        admit(scene, BOTH).await;
        route(scene, 2, "a", &scene.server.socket_dir());
        let ways = [scene.conninfo("alice", ""), scene.sharing("alice", "")];
        for conninfo in &ways {
            assert_eq!(seen(conninfo).await, "socket");
        }
        // Passwords are proven there as anywhere.
        let wrong = ways[0].replace(crate::harness::PASSWORD, "wrong");
        assert_eq!(told(&connect(&wrong).await.map(|_| ()).unwrap_err()).0, "28P01");
        // A cancel finds the way.
        let client = connect(&ways[0]).await.unwrap();
        let cancel = client.cancel_token();
        let admin = scene.admin().await;
        let (slept, ()) = tokio::join!(client.simple_query("SELECT pg_sleep(60)"), async {
            let sleeps = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%' AND state = 'active'";
            until("it sleeps", async || one(&admin, sleeps).await == "1").await;
            cancel.cancel_query(tokio_postgres::NoTls).await.unwrap();
        });
        assert_eq!(told(&slept.unwrap_err()).0, "57014");
        // Walsenders come by TCP, where agents have a line for them.
        let walsender = scene.conninfo("alice", "replication=database");
        let asked = crate::programs::psql(&walsender, "SELECT host(inet_client_addr())").await;
        assert_eq!(asked, Ok("127.0.0.1".to_owned()));
    }
}

story! {
    async fn what_is_not_the_servers_socket_is_passed_by(scene) {
        let conninfo = scene.conninfo("alice", "");
        let dir = &scene.server.socket_dir();
        // No line lets anybody in by the socket.
        admit(scene, OVER_TCP).await;
        route(scene, 2, "a", dir);
        assert_eq!(seen(&conninfo).await, "127.0.0.1");
        // Another node's socket under the same path.
        admit(scene, BOTH).await;
        route(scene, 3, "b", dir);
        scene.proxy.reconnect();
        assert_eq!(seen(&conninfo).await, "127.0.0.1");
        // Nobody listens there.
        route(scene, 4, "a", Path::new("/nonexistent"));
        scene.proxy.reconnect();
        assert_eq!(seen(&conninfo).await, "127.0.0.1");
        // What a role that comes in by a certificate is shown needs TLS.
        let mut changed = settings();
        changed.certificate_users = ["alice".to_owned()].into();
        scene.proxy.replace(changed);
        route(scene, 5, "a", dir);
        scene.proxy.reconnect();
        assert_eq!(seen(&conninfo).await, "127.0.0.1");
        // And by the socket again.
        scene.proxy.replace(settings());
        scene.proxy.reconnect();
        assert_eq!(seen(&conninfo).await, "socket");
    }
}

//! A role whose password PostgreSQL stores for md5.

use pgherd_proxy::Settings;
use pgherd_proxy::hba::Hba;
use tokio_postgres::Error;

use crate::harness::{PASSWORD, connect, one, settings, story, until};

/// SQLSTATE, message and hint.
fn refusal(error: &Error) -> (String, String, String) {
    let told = error.as_db_error().unwrap_or_else(|| panic!("{error:?}"));
    (told.code().code().to_owned(), told.message().to_owned(), told.hint().unwrap_or_default().to_owned())
}

fn lines(hba: &str, md5_passwords: bool) -> Settings {
    Settings { hba: Hba::parse(hba.lines()).unwrap(), md5_passwords, ..settings() }
}

story! {
    async fn who_has_a_password_for_md5_comes_in_where_that_is_enabled(scene) {
        let admin = scene.admin().await;
        admin.batch_execute(&format!(
            "SET password_encryption = md5; CREATE ROLE olga LOGIN PASSWORD '{PASSWORD}'; RESET password_encryption"
        )).await.unwrap();
        let stored = "SELECT rolpassword FROM pg_authid WHERE rolname = 'olga'";
        assert!(one(&admin, stored).await.starts_with("md5"));
        scene.server.admit(
            "host all,replication postgres,pgherd_proxy 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 md5\n",
        );
        admin.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        let (md5, scram) = ("host all all 127.0.0.1/32 md5", "host all all 127.0.0.1/32 scram-sha-256");
        let olga = scene.conninfo("olga", "");
        let come = async |settings: Settings, conninfo: &str| {
            scene.proxy.replace(settings);
            connect(conninfo).await.map_err(|error| refusal(&error))
        };

        // Off, as it is by itself.
        assert!(!settings().md5_passwords);
        let (sqlstate, message, hint) = come(lines(md5, false), &olga).await.unwrap_err();
        assert_eq!(sqlstate, "28000");
        assert_eq!(message, "the password of user \"olga\" is stored for md5, which this proxy does not take");
        assert!(hint.contains("\\password") && hint.contains("md5_passwords"), "{hint}");
        // A line that asks for SCRAM does not tell who has which password, whatever is enabled.
        let wrong = ("28P01".to_owned(), "password authentication failed for user \"olga\"".to_owned(), String::new());
        for enabled in [false, true] {
            assert_eq!(come(lines(scram, enabled), &olga).await.unwrap_err(), wrong);
        }

        // With servers of its own, with shared ones, and the same servers for the next client.
        let mall = olga.replace("dbname=shop", "dbname=mall");
        for conninfo in [&olga, &olga, &mall, &mall] {
            let client = come(lines(md5, true), conninfo).await.unwrap();
            assert_eq!(one(&client, "SELECT session_user").await, "olga");
        }
        assert_eq!(come(lines(md5, true), &olga.replace(PASSWORD, "else")).await.unwrap_err(), wrong);
        // Who has one for SCRAM proves that, and who is not there hears what all hear.
        let alice = come(lines(md5, true), &scene.conninfo("alice", "")).await.unwrap();
        assert_eq!(one(&alice, "SELECT session_user").await, "alice");
        let nobody = come(lines(md5, true), &scene.conninfo("nobody", "")).await.unwrap_err();
        assert_eq!(nobody.0, "28P01");

        // The password is set again, and the line may stay as it is.
        admin.batch_execute(&format!("ALTER ROLE olga PASSWORD '{PASSWORD}'")).await.unwrap();
        assert!(one(&admin, stored).await.starts_with("SCRAM-SHA-256$"));
        scene.proxy.reconnect();
        until("it is asked for again", async || match come(lines(md5, false), &olga).await {
            Ok(client) => one(&client, "SELECT session_user").await == "olga",
            Err(_) => false,
        })
        .await;
    }
}

//! Files as installations have them, and what is made of them.

use pgherd_core::spec::ProxyOption;

use super::*;
use crate::files::herd;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/import").join(name)
}

fn note_of<'a>(imported: &'a Imported, key: &str) -> (Outcome, &'a str) {
    let found = imported.settings.iter().find(|setting| setting.key == key);
    let found = found.unwrap_or_else(|| panic!("no {key} in {:#?}", imported.settings));
    (found.outcome, &found.note)
}

/// What is printed, put into a herd file, is one.
fn read_back(imported: &Imported) -> herd::Herd {
    let toml = imported.to_toml();
    let postgres = if imported.hba.is_empty() { "[postgres]\n" } else { "" };
    let toml = toml.replace("hba = [", "version = 15\nhba = [");
    let version = if imported.hba.is_empty() { "version = 15\n" } else { "" };
    let nodes: String = ["a", "b"]
        .iter()
        .map(|node| format!("[[cluster.node]]\nname = \"{node}\"\nhost = \"host-{node}\"\n"))
        .collect();
    let file = format!("name = \"shop\"\n{toml}\n{postgres}{version}[[cluster]]\nname = \"main\"\n{nodes}");
    herd::read("herd.toml", &file).unwrap_or_else(|findings| panic!("{findings}\n{file}"))
}

#[test]
fn a_pgbouncer_becomes_the_proxy_part_of_a_herd_file() {
    let imported = import(&[fixture("pgbouncer.ini")]).unwrap();
    let proxy = read_back(&imported).spec.clusters[0].proxy.clone().unwrap();
    assert_eq!((proxy.port, proxy.pool_size, proxy.pool.as_str()), (6432, 25, "transaction"));
    assert_eq!(proxy.console_admins, ["alice".to_owned(), "bob".to_owned()].into());
    assert_eq!(proxy.console_readers, ["monitor".to_owned()].into());
    let said = |option: ProxyOption| proxy.option(option).to_string();
    let options = [ProxyOption::MaxClients, ProxyOption::QueryWait, ProxyOption::QueryTimeout].map(said);
    assert_eq!(options, ["2000", "30s", "never"]);
    let pools = |pools: &BTreeMap<String, pgherd_core::spec::Pool>| -> Vec<String> {
        pools.iter().map(|(name, pool)| format!("{name}={}", pool.as_str())).collect()
    };
    assert_eq!(pools(&proxy.databases), ["odd name=statement", "reports=session"]);
    assert_eq!(pools(&proxy.users), ["migrate=session"]);
    let hba = read_back(&imported).spec.clusters[0].postgres.hba.clone();
    assert_eq!(
        hba,
        [
            "host    shop      all   10.0.0.0/8     scram-sha-256",
            "hostssl all       all   0.0.0.0/0      reject"
        ]
    );

    // Nothing is passed over in silence, and each says where it stood.
    let outcome = |key: &str| note_of(&imported, key).0;
    assert_eq!(outcome("auth_file"), Outcome::Implied);
    assert_eq!(outcome("auth_type"), Outcome::NotTaken);
    assert_eq!(outcome("max_client_conn"), Outcome::Taken);
    assert_eq!(outcome("so_reuseport"), Outcome::Implied);
    assert_eq!(outcome("[databases] reports: dbname"), Outcome::NotTaken);
    assert_eq!(outcome("[databases] shop: dbname"), Outcome::Implied);
    assert_eq!(outcome("[databases] reports: password"), Outcome::NotTaken);
    assert_eq!(outcome("sever_lifetime"), Outcome::Unknown, "a slip of the pen");
    assert_eq!(outcome("host all old"), Outcome::NotTaken);
    assert_eq!(outcome("nonsense"), Outcome::Unknown);
    assert!(imported.has_unknown());
    let twice: Vec<&Setting> =
        imported.settings.iter().filter(|setting| setting.key == "default_pool_size").collect();
    assert_eq!((twice[0].outcome, twice[1].outcome), (Outcome::Taken, Outcome::NotTaken));
    assert!(twice[1].file.ends_with("extra.ini") && twice[1].line == 4);
}

#[test]
fn a_pgpool_becomes_one_too() {
    let imported = import(&[fixture("pgpool.conf")]).unwrap();
    let herd = read_back(&imported);
    let proxy = herd.spec.clusters[0].proxy.clone().unwrap();
    assert_eq!((proxy.port, proxy.pool.as_str()), (9999, "session"), "it knows no other way");
    assert_eq!(herd.spec.clusters[0].postgres.hba.len(), 1, "of the file beside it");
    let outcome = |key: &str| note_of(&imported, key).0;
    assert_eq!(
        (outcome("backend_hostname1"), outcome("failover_command")),
        (Outcome::Implied, Outcome::Implied)
    );
    assert_eq!(
        (outcome("load_balance_mode"), outcome("delegate_ip")),
        (Outcome::NotTaken, Outcome::NotTaken)
    );
    assert_eq!(outcome("wibble"), Outcome::Unknown);
    // Both, as they are often found together: the first one counts.
    let both = import(&[fixture("pgbouncer.ini"), fixture("pgpool.conf")]).unwrap();
    let proxy = read_back(&both).spec.clusters[0].proxy.clone().unwrap();
    assert_eq!((proxy.port, proxy.pool.as_str()), (6432, "transaction"));
    assert!(note_of(&both, "port").1.contains("given before"));
}

#[test]
fn no_secret_is_told() {
    for name in ["pgbouncer.ini", "pgpool.conf"] {
        let imported = import(&[fixture(name)]).unwrap();
        let told =
            [imported.to_toml(), format!("{imported:?}"), serde_json::to_string(&imported).unwrap()].concat();
        for secret in ["secret", "hunter2"] {
            assert!(!told.contains(secret), "{secret} in {told}");
        }
        assert!(!imported.files.iter().any(|file| file.contains("userlist") || file.contains("pool_passwd")));
    }
}

#[test]
fn a_map_and_the_lines_that_name_it_are_taken_together() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    write(
        "ident",
        "# who is who\npeople /^(.*)@example\\.com$ \\1\npeople \"CN=Bob,O=x\" bob # b\nbroken a\n",
    );
    write(
        "hba",
        "hostssl all all 0.0.0.0/0 cert map=people\nhostssl all all 0.0.0.0/0 cert map=broken\nhostssl all old all cert\n",
    );
    write("pgbouncer.ini", "[pgbouncer]\nauth_hba_file = hba\nauth_ident_file = ident\n");
    let imported = import(&[dir.path().join("pgbouncer.ini")]).unwrap();
    let postgres = read_back(&imported).spec.clusters[0].postgres.clone();
    assert_eq!(postgres.hba, ["hostssl all all 0.0.0.0/0 cert map=people", "hostssl all old all cert"]);
    let lines = ["people /^(.*)@example\\.com$ \\1", "people \"CN=Bob,O=x\" bob # b"];
    assert_eq!(postgres.ident, lines);
    assert_eq!(note_of(&imported, "broken"), (Outcome::NotTaken, "the line ends before the role"));
    let hba: Vec<&Setting> =
        imported.settings.iter().filter(|setting| setting.key == "hostssl all all").collect();
    assert_eq!((hba[0].outcome, hba[1].outcome), (Outcome::Taken, Outcome::NotTaken));
    assert!(hba[0].note.contains("certificate_users") && hba[1].note.contains("the map broken"));
}

#[test]
fn what_cannot_be_read_says_where() {
    let dir = tempfile::tempdir().unwrap();
    let failed = |text: &str| {
        let path = dir.path().join("pgbouncer.ini");
        std::fs::write(&path, text).unwrap();
        import(&[path]).unwrap_err().to_string()
    };
    assert!(failed("[databases]\nx = host='a\n").ends_with("pgbouncer.ini:2: a quote does not end"));
    assert!(failed("[databases]\nnothing\n").ends_with(":2: it is neither a section nor a setting"));
    assert!(failed("[pgbouncer\n[databases]\n").ends_with(":1: a section does not end"));
    assert!(failed("%include pgbouncer.ini\n").contains("include each other"));
    assert!(failed("%include nowhere.ini\n").contains("nowhere.ini"));
    let missing = import(&[dir.path().join("none.ini")]).unwrap_err();
    assert!(missing.to_string().starts_with("cannot read"), "{missing}");
}

#[test]
fn a_time_is_taken_in_the_herd_files_words() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pgbouncer.ini");
    let times = "query_timeout = 0\ntransaction_timeout = 1.5\nserver_lifetime = 3600\nserver_idle_timeout = 0\n\
                 client_idle_timeout = soon\nmax_user_client_connections = 7\n";
    std::fs::write(&path, format!("[pgbouncer]\n{times}")).unwrap();
    let imported = import(&[path]).unwrap();
    let proxy = read_back(&imported).spec.clusters[0].proxy.clone().unwrap();
    let taken: Vec<String> =
        proxy.options.iter().map(|(option, value)| format!("{}={value}", option.name())).collect();
    assert_eq!(
        taken,
        ["max_user_clients=7", "transaction_timeout=1500ms", "query_timeout=never", "server_lifetime=1h"]
    );
    let outcome = |key: &str| note_of(&imported, key).0;
    assert_eq!(
        (outcome("server_idle_timeout"), outcome("client_idle_timeout")),
        (Outcome::NotTaken, Outcome::Unknown)
    );
}

/// Names and values that would end a remark or a text.
#[test]
fn nothing_in_a_file_gets_out_of_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pgbouncer.ini");
    std::fs::write(&path, "[databases]\n\"a] # x\" = pool_mode=session\n[pgbouncer]\nadmin_users = a\"b,c\n")
        .unwrap();
    let imported = import(&[path]).unwrap();
    let proxy = read_back(&imported).spec.clusters[0].proxy.clone().unwrap();
    assert_eq!(proxy.console_admins, ["a\"b".to_owned(), "c".to_owned()].into());
    assert_eq!(proxy.databases.keys().collect::<Vec<_>>(), ["a] # x"]);
}

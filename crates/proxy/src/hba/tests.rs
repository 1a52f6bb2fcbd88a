//! Lines and the clients whom they are about.

use pgherd_pgwire::startup::Version;

use super::*;

fn asked(user: &str, database: &str) -> Asked {
    Asked {
        user: user.to_owned(),
        database: database.to_owned(),
        replication: Replication::Off,
        version: Version::V3_0,
        parameters: Vec::new(),
    }
}

fn from<'a>(address: &str, encrypted: bool, certificate: &'a Certificate) -> From<'a> {
    From { address: address.parse().unwrap(), encrypted, certificate }
}

fn verdict(lines: &[&str], user: &str, database: &str, address: &str, encrypted: bool) -> String {
    shown(lines, user, database, from(address, encrypted, &Certificate::NotAskedFor), ClientCert::Any)
}

fn shown(lines: &[&str], user: &str, database: &str, from: From<'_>, least: ClientCert) -> String {
    let hba = Hba::parse(lines.iter().copied()).unwrap();
    match hba.method(&asked(user, database), from, least) {
        Method::ScramSha256 => "scram".to_owned(),
        Method::Md5 => "md5".to_owned(),
        Method::Admit => "admitted".to_owned(),
        Method::Reject { message } => message,
    }
}

#[test]
fn the_first_line_that_fits_decides() {
    let lines = [
        "# TYPE DATABASE USER ADDRESS METHOD",
        "",
        "local all all peer",
        "host all mallory all reject",
        "hostssl shop,\"all\" app,anna 10.0.0.0/8 scram-sha-256 # applications",
        "hostnossl all old 10.0.0.0 255.255.0.0 md5",
        "host sameuser all 192.168.7.7/32 scram-sha-256",
        "host all six ::1/128 scram-sha-256",
    ];
    for (user, database, from, encrypted) in [
        ("app", "shop", "10.1.2.3", true),
        ("anna", "all", "10.1.2.3", true),
        ("app", "shop", "::ffff:10.1.2.3", true),
        ("old", "x", "10.0.200.1", false),
        ("me", "me", "192.168.7.7", false),
        ("six", "x", "::1", true),
    ] {
        let expected = if user == "old" { "md5" } else { "scram" };
        assert_eq!(verdict(&lines, user, database, from, encrypted), expected, "{user} {database} {from}");
    }
    for (user, database, from, encrypted) in [
        ("app", "shop", "10.1.2.3", false),
        ("app", "shop", "11.1.2.3", true),
        ("app", "other", "10.1.2.3", true),
        ("old", "x", "10.1.0.1", false),
        ("old", "x", "10.0.0.1", true),
        ("me", "you", "192.168.7.7", false),
        ("me", "me", "192.168.7.8", false),
        ("six", "x", "::2", true),
    ] {
        let encryption = if encrypted { "SSL encryption" } else { "no encryption" };
        assert_eq!(
            verdict(&lines, user, database, from, encrypted),
            format!(
                "no pg_hba.conf entry for host \"{from}\", user \"{user}\", database \"{database}\", {encryption}"
            )
        );
    }
    assert_eq!(
        verdict(&lines, "mallory", "shop", "10.0.0.1", true),
        "pg_hba.conf rejects connection for host \"10.0.0.1\", user \"mallory\", database \"shop\", SSL encryption"
    );
}

#[test]
fn what_a_proxy_cannot_judge_refuses_those_whom_it_may_be_about() {
    for line in [
        "host all +readers all reject",
        "host samerole all all scram-sha-256",
        "host all all db.example.com reject",
        "host all all samenet scram-sha-256",
        "host /^shop all all scram-sha-256",
        "host \"/^shop\" all all reject",
        "host all \"/^app\" all reject",
    ] {
        let lines = [line, "host all all all scram-sha-256"];
        assert_eq!(
            verdict(&lines, "app", "shop", "10.0.0.1", true),
            "hba line 1 asks for what a proxy cannot know: whether it is about this client",
            "{line}"
        );
    }
    let lines = ["hostssl other +readers samehost reject", "host all all all scram-sha-256"];
    assert_eq!(verdict(&lines, "app", "shop", "10.0.0.1", true), "scram", "it is about another database");
    for (line, what) in [("host all all all ldap ldapserver=x", "ldap"), ("host all all all trust", "trust")]
    {
        assert_eq!(
            verdict(&[line], "app", "shop", "10.0.0.1", true),
            format!("the proxy does not support \"{what}\" of hba line 1")
        );
    }
}

#[test]
fn certificates_are_asked_for_by_lines_and_by_the_mode() {
    let verified = |name: &str| named(name, "CN=whoever");
    let lacks = "connection requires a valid client certificate";
    let failed = "certificate authentication failed for user \"app\"";
    let nobody = "hba line 1 asks for a certificate, and the proxy has no authority to verify it by";
    let scram = "hostssl all all all scram-sha-256";
    let (ca, full, cert) = (
        &format!("{scram} clientcert=verify-ca"),
        &format!("{scram} clientcert=verify-full clientname=CN"),
        "hostssl all all all cert",
    );
    for (line, least, none, other, own, unnamed, not_asked) in [
        (scram, ClientCert::Any, "scram", "scram", "scram", "scram", "scram"),
        (scram, ClientCert::VerifyCa, lacks, "scram", "scram", "scram", nobody),
        (scram, ClientCert::VerifyFull, lacks, failed, "scram", failed, nobody),
        (ca, ClientCert::Any, lacks, "scram", "scram", "scram", nobody),
        (ca, ClientCert::VerifyFull, lacks, failed, "scram", failed, nobody),
        (full, ClientCert::Any, lacks, failed, "scram", failed, nobody),
        (full, ClientCert::VerifyCa, lacks, failed, "scram", failed, nobody),
        (cert, ClientCert::Any, lacks, failed, "admitted", failed, nobody),
        (cert, ClientCert::VerifyCa, lacks, failed, "admitted", failed, nobody),
    ] {
        for (certificate, expected) in [
            (Certificate::None, none),
            (verified("anna"), other),
            (verified("app"), own),
            (Certificate::Verified(Names::default()), unnamed),
            (Certificate::NotAskedFor, not_asked),
        ] {
            let from = from("10.0.0.1", true, &certificate);
            let found = shown(&[line], "app", "shop", from, least);
            assert_eq!(found, expected, "{line}, {least:?}, {certificate:?}");
        }
    }
    assert_eq!(
        shown(&[cert], "app", "shop", from("10.0.0.1", false, &Certificate::None), ClientCert::Any),
        "no pg_hba.conf entry for host \"10.0.0.1\", user \"app\", database \"shop\", no encryption",
        "hostssl is not about who came in clear"
    );
}

fn named(common: &str, subject: &str) -> Certificate {
    Certificate::Verified(Names { common: Some(common.to_owned()), subject: Some(subject.to_owned()) })
}

#[test]
fn a_line_says_which_name_counts_and_for_whom() {
    let maps = [
        "people anna@example.com anna",
        "people \"CN=Bob,O=Shop\" bob",
        "staff /^(.*)@example\\.com$ \\1",
        "clubs x +club",
    ];
    let scram = "hostssl all all all scram-sha-256 clientcert=verify-full clientname=DN";
    for (line, common, subject, user, least, expected) in [
        ("cert map=people", "anna@example.com", "CN=x", "anna", ClientCert::Any, "admitted"),
        ("cert map=people", "anna@example.com", "CN=x", "bob", ClientCert::Any, "failed"),
        // It counts in place of the name itself.
        ("cert map=people", "anna", "CN=x", "anna", ClientCert::Any, "failed"),
        ("cert map=people", "CN=Bob,O=Shop", "CN=Bob,O=Shop", "bob", ClientCert::Any, "admitted"),
        ("cert map=people clientname=DN", "bob", "CN=Bob,O=Shop", "bob", ClientCert::Any, "admitted"),
        ("cert map=people clientname=DN", "anna@example.com", "CN=x", "anna", ClientCert::Any, "failed"),
        ("cert clientname=DN", "bob", "CN=Bob,O=Shop", "bob", ClientCert::Any, "failed"),
        ("cert clientname=DN", "x", "CN=bob", "CN=bob", ClientCert::Any, "admitted"),
        ("cert map=staff", "carol@example.com", "CN=x", "carol", ClientCert::Any, "admitted"),
        ("cert map=staff", "carol@example.com", "CN=x", "anna", ClientCert::Any, "failed"),
        ("cert map=nothing", "carol", "CN=x", "carol", ClientCert::Any, "failed"),
        (
            "cert map=clubs",
            "x",
            "CN=x",
            "carol",
            ClientCert::Any,
            "ident line 4 asks for what a proxy cannot know: who is a member of role \"club\"",
        ),
        // The mode asks for a name; the line says which one.
        ("cert map=people", "anna@example.com", "CN=x", "anna", ClientCert::VerifyFull, "admitted"),
        (scram, "x", "CN=bob", "CN=bob", ClientCert::Any, "scram"),
        (scram, "bob", "CN=Bob,O=Shop", "bob", ClientCert::Any, "failed"),
    ] {
        let line =
            if line.starts_with("cert") { format!("hostssl all all all {line}") } else { line.to_owned() };
        let hba = Hba::parse([line.as_str()]).unwrap().mapped_by(Maps::parse(maps).unwrap());
        let certificate = named(common, subject);
        let found = match hba.method(&asked(user, "shop"), from("10.0.0.1", true, &certificate), least) {
            Method::ScramSha256 => "scram".to_owned(),
            Method::Md5 => "md5".to_owned(),
            Method::Admit => "admitted".to_owned(),
            Method::Reject { message } => {
                message.replace(&format!("certificate authentication failed for user \"{user}\""), "failed")
            }
        };
        assert_eq!(found, expected, "{line}: {common}, {subject} as {user}");
    }
    let no_name = Certificate::Verified(Names { common: None, subject: Some("CN=a,CN=b".to_owned()) });
    let all = Hba::parse(["hostssl all all all cert map=all"]).unwrap();
    let all = all.mapped_by(Maps::parse(["all \"/.*\" all"]).unwrap());
    let found = all.method(&asked("app", "shop"), from("10.0.0.1", true, &no_name), ClientCert::Any);
    assert!(matches!(found, Method::Reject { .. }), "a map is about names that there are");
}

#[test]
fn replication_is_a_database_of_its_own() {
    let hba = Hba::parse(["host replication rep all scram-sha-256", "host all all all reject"]).unwrap();
    let from = from("10.0.0.1", true, &Certificate::NotAskedFor);
    let physical = Asked { replication: Replication::Physical, ..asked("rep", "rep") };
    assert_eq!(hba.method(&physical, from, ClientCert::Any), Method::ScramSha256);
    let logical = Asked { replication: Replication::Logical, ..asked("rep", "replication") };
    assert!(matches!(hba.method(&logical, from, ClientCert::Any), Method::Reject { .. }));
    let all = Hba::parse(["host all all all scram-sha-256"]).unwrap();
    assert_eq!(
        all.method(&physical, from, ClientCert::Any),
        Method::Reject {
            message: "no pg_hba.conf entry for replication connection from host \"10.0.0.1\", user \"rep\", SSL encryption"
                .to_owned()
        }
    );
}

#[test]
fn lines_that_are_none_are_named() {
    for (line, what) in [
        ("hosts all all all scram-sha-256", "it must begin with local, host, hostssl or hostnossl"),
        ("host all all", "it lacks fields: type, database, user, address (not for local), method"),
        ("host all all all", "it lacks fields: type, database, user, address (not for local), method"),
        ("host all all 10.0.0.1 scram-sha-256", "its address lacks a valid netmask"),
        ("host all all 10.0.0.0/33 md5", "its address lacks a valid netmask"),
        ("host all all 10.0.0.0 255.0.255.0 md5", "its address lacks a valid netmask"),
        ("host all all a,b md5", "only databases and users may be lists"),
        ("host all \"all all md5", "a quote does not end"),
        ("host all all all cert", "method cert needs a line of type hostssl"),
        ("host all all all md5 clientcert=verify-ca", "clientcert needs a line of type hostssl"),
        ("host all all all md5 clientname=CN", "clientname needs a line of type hostssl"),
        ("hostssl all all all cert clientname=cn", "clientname takes CN or DN"),
        (
            "hostssl all all all scram-sha-256 clientcert=verify-full map=people",
            "map is no option of a method that asks for a password",
        ),
        (
            "hostssl all all all cert clientcert=verify-ca",
            "clientcert takes verify-ca or verify-full, and the latter with method cert",
        ),
        (
            "hostssl all all all md5 clientcert=1",
            "clientcert takes verify-ca or verify-full, and the latter with method cert",
        ),
    ] {
        let error = Hba::parse(["", line]).unwrap_err();
        assert_eq!(error, HbaError { number: 2, line: line.to_owned(), what }, "{line}");
    }
}

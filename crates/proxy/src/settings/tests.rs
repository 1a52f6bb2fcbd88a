//! From what a server has to what a client has.

use super::*;

#[test]
fn equal_values_are_one_and_forgotten_ones_make_room() {
    let shelf = Shelf::default();
    let values = |number: usize| Arc::new(Values::default().with("app.number", &number.to_string()));
    let first = shelf.one(values(0));
    for number in 1..10 * LEAST_SHELVED {
        shelf.one(values(number));
    }
    assert!(Arc::ptr_eq(&first, &shelf.one(values(0))));
    assert!(shelf.values.lock().unwrap().len() < 4 * LEAST_SHELVED, "nobody has the others");
}

fn values(values: &[(&str, &str)]) -> Values {
    values.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn changed(names: &[&str], reset: bool) -> Changed {
    Changed { names: names.iter().map(|name| (*name).to_owned()).collect(), reset }
}

fn found(rows: &[&str], changed: &Changed, before: &Values, startup: &Values) -> Found {
    Found::read(rows.iter().map(|row| (*row).to_owned()), changed, before, startup)
}

#[test]
fn a_server_is_brought_from_one_client_to_the_next() {
    let first = values(&[("work_mem", "1MB"), ("Search_Path", "a"), ("app.tenant", "7")]);
    let second = values(&[("work_mem", "1MB"), ("search_path", "b"), ("timezone", "UTC")]);
    assert_eq!(first.changes_to(&first.clone()), []);
    assert_eq!(
        first.changes_to(&second),
        [("app.tenant", None), ("search_path", Some("b")), ("timezone", Some("UTC"))]
    );
    assert_eq!(Values::default().changes_to(&values(&[("a", "1")])), [("a", Some("1"))]);
}

#[test]
fn a_role_is_laid_down_before_anything_is_set_and_taken_on_after_it() {
    let bob = values(&[("role", "bob"), ("work_mem", "1MB")]);
    let same = values(&[("role", "bob"), ("work_mem", "2MB")]);
    assert_eq!(bob.changes_to(&same), [("role", None), ("work_mem", Some("2MB")), ("role", Some("bob"))]);
    let other = values(&[("session_authorization", "eve"), ("role", "ann")]);
    assert_eq!(
        bob.changes_to(&other),
        [("role", None), ("work_mem", None), ("session_authorization", Some("eve")), ("role", Some("ann"))]
    );
    assert_eq!(other.changes_to(&Values::default()), [("role", None), ("session_authorization", None)]);
}

#[test]
fn only_what_changes_meaning_counts_for_statements() {
    let plain = values(&[("application_name", "a"), ("statement_timeout", "5")]);
    assert_eq!(plain.meaning(), Values::default().meaning());
    assert_ne!(values(&[("search_path", "a")]).meaning(), plain.meaning());
    assert_ne!(values(&[("search_path", "a")]).meaning(), values(&[("search_path", "b")]).meaning());
}

#[test]
fn what_the_server_says_is_set_is_set() {
    let (before, startup) = (values(&[("work_mem", "1MB")]), Values::default());
    let asked = changed(&["app.tenant", "col", "role", "work_mem"], false);
    let is = found(&["napp.tenant=a=b", "ncol", "nrole=none", "nwork_mem=3MB"], &asked, &before, &startup);
    assert_eq!(is.client, values(&[("app.tenant", "a=b"), ("work_mem", "3MB")]));
    assert_eq!((is.server, is.ties), (is.client, Ties::NONE));
    assert_eq!(names(&asked, &before).unwrap(), r#"{"app.tenant","col","role","work_mem"}"#);
    assert_eq!(names(&changed(&["a\"b\\"], false), &before).unwrap(), r#"{"a\"b\\"}"#);
    assert_eq!(names(&Changed::default(), &before), None);
}

#[test]
fn what_was_reset_is_as_the_client_came_with_it() {
    let startup = values(&[("application_name", "x"), ("work_mem", "1MB")]);
    let before = values(&[("application_name", "x"), ("work_mem", "9MB"), ("app.a", "1"), ("app.b", "2")]);
    let all = changed(&["timezone"], true);
    assert_eq!(names(&all, &before).unwrap(), r#"{"timezone","app.a","app.b"}"#);
    let is = found(&["stimezone=UTC", "napp.a=", "napp.b=2", "l", "a"], &all, &before, &startup);
    let own = [("timezone", "UTC"), ("app.a", ""), ("app.b", "2")];
    assert_eq!(is.server, values(&own));
    let client = [own.as_slice(), &[("application_name", "x"), ("work_mem", "1MB")]].concat();
    assert_eq!(is.client, values(&client));
    assert_eq!(is.ties, Ties::of(&[Tie::Listen, Tie::AdvisoryLock]));
}

#[test]
fn a_server_always_warns_whatever_its_client_wants_to_see() {
    let levels = |level: &str| Arc::new(values(&[("client_min_messages", level), ("work_mem", "1MB")]));
    for level in ["error", "FATAL", "panic"] {
        assert!(levels(level).hides_warnings());
        assert_eq!(levels(level).for_server(), levels("warning"));
    }
    for level in ["warning", "notice", "debug5", "log"] {
        assert!(!levels(level).hides_warnings() && levels(level).for_server() == levels(level), "{level}");
    }
    // The server is asked for all that is set, and says what the proxy has set there.
    let (silent, all) = (levels("error"), changed(&[], true));
    let rows = ["sclient_min_messages=warning", "swork_mem=1MB"];
    let mut is = found(&rows, &all, &silent.for_server(), &Values::default());
    is.keep_silence(&silent, &all);
    assert_eq!((is.client, is.server), (Values::clone(&silent), Values::clone(&levels("warning"))));
    let asked = changed(&["client_min_messages"], true);
    let mut is = found(&rows, &asked, &silent.for_server(), &Values::default());
    is.keep_silence(&silent, &asked);
    assert_eq!(is.client, *levels("warning"), "it has changed its mind");
    let mut is = found(&["swork_mem=1MB"], &all, &silent.for_server(), &Values::default());
    is.keep_silence(&silent, &all);
    assert_eq!(is.client, values(&[("work_mem", "1MB")]), "it was reset");
}

#[test]
fn nothing_is_asked_when_nothing_can_have_changed() {
    assert_eq!(question(&Changed::default(), Ties::NONE), None);
}

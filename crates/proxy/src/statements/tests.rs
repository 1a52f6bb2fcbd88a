//! Names of clients and of servers, without either.

use super::*;

#[test]
fn what_means_the_same_is_the_same_statement() {
    let registry = Registry::default();
    let first = registry.of(b"SELECT $1", &[23], 7).unwrap();
    assert!(Arc::ptr_eq(&first, &registry.of(b"SELECT $1", &[23], 7).unwrap()));
    for (text, types, meaning) in
        [(&b"SELECT $1 "[..], &[23][..], 7), (b"SELECT $1", &[25], 7), (b"SELECT $1", &[23], 8)]
    {
        assert_ne!(registry.of(text, types, meaning).unwrap().name(), first.name());
    }
    let name = first.name().to_vec();
    drop(first);
    assert_ne!(registry.of(b"SELECT $1", &[23], 7).unwrap().name(), name, "nobody had it any more");
}

#[test]
fn the_registry_forgets_what_nobody_has() {
    let registry = Registry::default();
    let kept = registry.of(b"kept", &[], 0).unwrap();
    for number in 0..10 * LEAST_SWEPT {
        registry.of(number.to_string().as_bytes(), &[], 0).unwrap();
    }
    assert!(registry.by_key.lock().unwrap().statements.len() <= LEAST_SWEPT + 1);
    assert!(Arc::ptr_eq(&kept, &registry.of(b"kept", &[], 0).unwrap()));
}

#[test]
fn a_server_is_asked_to_parse_once_and_again_when_in_doubt() {
    let (registry, mut known) = (Registry::default(), Known::new(2));
    let [a, b, c] = [b"a", b"b", b"c"].map(|text| registry.of(text, &[], 0).unwrap());
    assert_eq!((known.need(&a), known.need(&a)), (Need::Parse, Need::Nothing));
    assert_eq!((known.need(&b), known.evict().is_none()), (Need::Parse, true));
    known.need(&a);
    assert_eq!(known.need(&c), Need::Parse);
    assert_eq!(known.evict().unwrap().name(), b.name(), "used longest ago");
    assert_eq!(known.need(&a), Need::Nothing);
    known.doubt(&a);
    assert_eq!((known.need(&a), known.need(&a)), (Need::CloseAndParse, Need::Nothing));
    known.doubt_all();
    assert!(!known.has(&c));
    assert_eq!((known.need(&c), known.need(&b)), (Need::CloseAndParse, Need::Parse));
    known.clear();
    assert!(known.is_empty());
}

#[test]
fn a_statement_whose_rows_have_changed_is_prepared_as_another_one() {
    let registry = Registry::default();
    let old = registry.of(b"SELECT * FROM t", &[], 0).unwrap();
    assert!(!old.is_retired());
    registry.retire(&old);
    let new = registry.of(b"SELECT * FROM t", &[], 0).unwrap();
    assert!(old.is_retired() && !new.is_retired() && old.name() != new.name());
    registry.retire(&old);
    assert!(
        Arc::ptr_eq(&new, &registry.of(b"SELECT * FROM t", &[], 0).unwrap()),
        "the old one is known to be old"
    );
}

#[test]
fn what_was_not_done_is_taken_back_in_reverse() {
    let (registry, mut known, mut names) = (Registry::default(), Known::new(9), Names::default());
    let [a, b] = [b"a", b"b"].map(|text| registry.of(text, &[], 0).unwrap());
    let room = || registry.room_for_name(b"x").unwrap();
    let of = |names: &Names, name: &[u8]| names.get(name).map(|statement| statement.name().to_vec());
    known.need(&a);
    names.define(b"x", Arc::clone(&a), room(), 1, true);
    names.confirm(1);
    names.settle(2, &mut known);
    assert_eq!(of(&names, b"x"), Some(a.name().to_vec()));
    assert_eq!(known.need(&a), Need::Nothing, "it was confirmed");

    // A batch in which nothing was done: x was closed, and given another meaning.
    names.remove(b"x", 3);
    known.need(&b);
    names.define(b"x", Arc::clone(&b), room(), 4, true);
    names.define(b"y", Arc::clone(&b), room(), 5, false);
    names.settle(6, &mut known);
    assert_eq!((of(&names, b"x"), of(&names, b"y")), (Some(a.name().to_vec()), None));
    assert_eq!(known.need(&b), Need::CloseAndParse);

    // What came behind is not judged yet.
    names.define(b"y", Arc::clone(&b), room(), 9, true);
    names.settle(8, &mut known);
    assert_eq!(of(&names, b"y"), Some(b.name().to_vec()));
    names.confirm(9);

    // The one without a name: skipped, refused, and closed in vain.
    let of = |names: &Names| (names.unnamed().number, names.unnamed().text.clone());
    let five = names.define_unnamed(&registry, b"five", [].into_iter(), 10).unwrap();
    names.confirm(10);
    names.define_unnamed(&registry, b"six", [].into_iter(), 11).unwrap();
    names.settle(12, &mut known);
    assert_eq!((of(&names), known.unnamed()), ((five, b"five".to_vec()), UNKNOWN));
    names.remove_unnamed(13);
    assert_eq!(names.unnamed().number, NONE);
    names.settle(14, &mut known);
    assert_eq!(of(&names), (five, b"five".to_vec()));
    names.define_unnamed(&registry, b"seven", [].into_iter(), 15).unwrap();
    names.refuse(15);
    names.settle(16, &mut known);
    assert_eq!(names.unnamed().number, NONE);
}

#[test]
fn what_is_prepared_takes_room_for_as_long_as_somebody_has_it() {
    let long = vec![b'x'; 10_000];
    let registry = Registry::with_room(25_000);
    let taken = |registry: &Registry| registry.kept.taken_bytes();
    // The same text is there once, whatever was set when it was prepared.
    let first = registry.of(&long, &[], 1).unwrap();
    let second = registry.of(&long, &[], 1).unwrap();
    let under = registry.again(&first, 2);
    assert_eq!(taken(&registry), 10_000);
    let other = registry.unshared(&long, &[], 1).unwrap();
    assert_eq!(taken(&registry), 20_000);
    // So does a statement without a name, and a name.
    let mut names = Names::default();
    assert_eq!(names.define_unnamed(&registry, &long, [].into_iter(), NO_TICKET), None);
    assert!(registry.of(&long[1..], &[], 1).is_none());
    let room = registry.room_for_name(b"name").unwrap();
    names.define(b"name", second, room, NO_TICKET, true);
    assert_eq!(taken(&registry), 20_000 + NAME_BYTES + 4);
    drop(other);
    assert!(names.define_unnamed(&registry, &long, [].into_iter(), NO_TICKET).is_some());
    assert!(registry.room_to_keep(10_000).is_none());
    // It is overwritten, or forgotten, and gone.
    names.forget_unnamed();
    assert_eq!(taken(&registry), 10_000 + NAME_BYTES + 4);
    assert!(names.define_unnamed(&registry, &long, [].into_iter(), NO_TICKET).is_some());
    assert!(names.define_unnamed(&registry, b"short", [].into_iter(), NO_TICKET).is_some());
    assert_eq!(taken(&registry), 10_000 + NAME_BYTES + 4);
    names.clear();
    drop((first, under));
    // What nobody has any more makes room when it is needed.
    assert!(registry.room_to_keep(25_000).is_some());
}

#[test]
fn long_texts_that_nobody_has_are_forgotten_before_there_are_many() {
    let registry = Registry::default();
    for number in 0..100_u8 {
        registry.of(&vec![number; 1 << 20], &[], 0).unwrap();
    }
    assert!(registry.kept.taken_bytes() <= LEAST_SWEPT_BYTES + (1 << 20));
}

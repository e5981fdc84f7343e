// SPDX-License-Identifier: GPL-2.0

//! Sizes of memory as people write them.

/// One KiB in bytes.
pub const KIB: u64 = 1 << 10;
/// One MiB in bytes.
pub const MIB: u64 = 1 << 20;
/// One GiB in bytes.
pub const GIB: u64 = 1 << 30;

/// Reads a size such as `256M`, `1G`, `1536MiB` or `268435456` (bytes). The suffixes K, M, G and T, in
/// either case, with an optional `B` or `iB`, are powers of 1024.
///
/// # Errors
///
/// A text that says what is wrong: no number, an unknown suffix, or more than 2^64 - 1 bytes.
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, suffix) = text.split_at(digits);
    if number.is_empty() {
        return Err("a size is a number with K, M, G or T behind it, such as 256M".to_owned());
    }
    let suffix = suffix.to_ascii_uppercase();
    let unit = suffix
        .strip_suffix("IB")
        .or_else(|| suffix.strip_suffix('B'))
        .unwrap_or(&suffix);
    let shift = match unit {
        "" if suffix != "IB" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(format!("the suffix of {text:?} is none of K, M, G and T")),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| format!("{text:?} is too large a number"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text:?} is too large a number"))
}

/// Writes a size in the largest unit that divides it, from bytes to GiB: `256 MiB`.
#[must_use]
pub fn text(bytes: u64) -> String {
    match bytes {
        0 => "0 bytes".to_owned(),
        _ if bytes.is_multiple_of(GIB) => format!("{} GiB", bytes / GIB),
        _ if bytes.is_multiple_of(MIB) => format!("{} MiB", bytes / MIB),
        _ if bytes.is_multiple_of(KIB) => format!("{} KiB", bytes / KIB),
        _ => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096b", 4096),
            ("4k", 4096),
            ("256M", 268_435_456),
            ("256MB", 268_435_456),
            ("256MiB", 268_435_456),
            ("3g", 3_221_225_472),
            ("1T", 1_099_511_627_776),
            ("16777215T", 0xffff_ff00_0000_0000),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "", "M", "-1", "1.5G", "256X", "256iB", " 1", "1 M", "0x10", "1MM",
        ] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn too_large_is_refused_and_does_not_wrap() {
        for text in [
            "16777216T",
            "18446744073709551616",
            "99999999999999999999999G",
        ] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn text_takes_the_largest_unit() {
        for (bytes, expected) in [
            (0, "0 bytes"),
            (1, "1 bytes"),
            (1536, "1536 bytes"),
            (2048, "2 KiB"),
            (256 * MIB, "256 MiB"),
            (1536 * MIB, "1536 MiB"),
            (2 * GIB, "2 GiB"),
        ] {
            assert_eq!(text(bytes), expected);
        }
    }
}

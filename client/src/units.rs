//! Sizes and durations with units, as people write them, and back. Pure.

use std::time::Duration;

/// Parses a size with a unit into bytes: `512M`, `2G`, `1.5G`, `64KiB`. Units are powers of 1024.
///
/// # Errors
///
/// Says what is wrong and shows an example.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" => return Err(format!("`{text}` has no unit; write for example 512M or 2G")),
        "b" => 0,
        "k" | "ki" | "kib" => 10,
        "m" | "mi" | "mib" => 20,
        "g" | "gi" | "gib" => 30,
        "t" | "ti" | "tib" => 40,
        "kb" | "mb" | "gb" | "tb" => {
            let unit = unit.to_ascii_uppercase();
            return Err(format!("`{unit}` could mean powers of 1000 or of 1024; write {} for 1024", &unit[..1]));
        }
        _ => return Err(format!("`{text}` is not a size; write for example 512M or 2G")),
    };
    scaled(number, 1 << shift).ok_or_else(|| format!("`{text}` is not a size; write for example 512M or 2G"))
}

/// Parses a size that must be a whole number of MiB, and gives that number.
///
/// # Errors
///
/// Says what is wrong and shows an example.
pub fn parse_mib(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    if bytes == 0 || !bytes.is_multiple_of(1 << 20) {
        return Err(format!("`{text}` is not a whole number of MiB; write for example 512M or 2G"));
    }
    Ok(bytes >> 20)
}

/// Parses a number of bytes, with or without a unit, that fits into 32 bits.
///
/// # Errors
///
/// Says what is wrong and shows an example.
pub fn parse_bytes(text: &str) -> Result<u32, String> {
    let all_digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let bytes = if all_digits { parse_size(&format!("{text}B"))? } else { parse_size(text)? };
    u32::try_from(bytes).map_err(|_| format!("`{text}` is too large; at most 4095M"))
}

/// Parses a duration of whole seconds.
///
/// # Errors
///
/// Says what is wrong and shows an example.
pub fn parse_seconds(text: &str) -> Result<u32, String> {
    let d = parse_duration(text)?;
    let whole = d.subsec_nanos() == 0 && !d.is_zero();
    let seconds = if whole { u32::try_from(d.as_secs()).ok() } else { None };
    seconds.ok_or_else(|| format!("`{text}` is not a whole number of seconds; write for example 60s"))
}

/// Parses a duration with a unit: `500ms`, `6s`, `5m`, `1h`.
///
/// # Errors
///
/// Says what is wrong and shows an example.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text);
    let millis = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60 * 1000,
        "h" => 60 * 60 * 1000,
        "" => return Err(format!("`{text}` has no unit; write for example 6s or 5m")),
        _ => return Err(format!("`{text}` is not a duration; write for example 500ms, 6s, 5m or 1h")),
    };
    scaled(number, millis)
        .map(Duration::from_millis)
        .ok_or_else(|| format!("`{text}` is not a duration; write for example 500ms, 6s, 5m or 1h"))
}

/// Parses `KEY=VALUE`.
///
/// # Errors
///
/// There is no `=`, or nothing before it.
pub fn parse_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("`{text}` is not of the form KEY=VALUE")),
    }
}

/// A number of bytes for people: `512 MiB`, `1.5 GiB`, `300 B`.
#[must_use]
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut unit = 0;
    while unit + 1 < UNITS.len() && n >> (10 * (unit + 1)) > 0 {
        unit += 1;
    }
    let whole = 1u64 << (10 * unit);
    if n.is_multiple_of(whole) {
        return format!("{} {}", n / whole, UNITS[unit]);
    }
    // Whole numbers would do for the machine; people want to see 1.5.
    let tenths = u128::from(n) * 10 / u128::from(whole);
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

/// A duration for people, to one or two places: `350ms`, `8.2s`, `4m10s`, `3h5m`, `12d`.
#[must_use]
pub fn duration(d: Duration) -> String {
    let s = d.as_secs();
    match s {
        0 => format!("{}ms", d.as_millis()),
        1..60 => {
            let tenths = d.as_millis() / 100;
            if tenths.is_multiple_of(10) { format!("{s}s") } else { format!("{s}.{}s", tenths % 10) }
        }
        60..3600 => format!("{}m{}", s / 60, rest(s % 60, "s")),
        3600..86_400 => format!("{}h{}", s / 3600, rest(s % 3600 / 60, "m")),
        _ => format!("{}d", s / 86_400),
    }
}

fn rest(n: u64, unit: &str) -> String {
    if n == 0 { String::new() } else { format!("{n}{unit}") }
}

fn split(text: &str) -> (&str, &str) {
    let text = text.trim();
    text.split_at(text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len()))
}

/// A decimal number with up to three places, times `unit`.
fn scaled(number: &str, unit: u64) -> Option<u64> {
    let (whole, fraction) = number.trim().split_once('.').unwrap_or((number.trim(), "0"));
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(fraction) || fraction.len() > 3 {
        return None;
    }
    let thousandths = fraction.parse::<u128>().ok()? * 10u128.pow(3 - u32::try_from(fraction.len()).ok()?);
    let total = (whole.parse::<u64>().map(u128::from).ok()? * 1000 + thousandths) * u128::from(unit);
    if total.is_multiple_of(1000) { u64::try_from(total / 1000).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_need_a_unit_and_mean_powers_of_1024() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("2GiB"), Ok(2 << 30));
        assert_eq!(parse_size("1.5g"), Ok(3 << 29));
        assert_eq!(parse_size("16777215T"), Ok(16_777_215 << 40));
        for bad in ["", "512", "-1M", "M", "1..5G", "1.2345G", "99999999T", "2GB", "2X", "1e3M", "0x10M", "1 000M"] {
            assert!(parse_size(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn memory_is_a_whole_number_of_mib() {
        assert_eq!(parse_mib("512M"), Ok(512));
        assert_eq!(parse_mib("0.5G"), Ok(512));
        for bad in ["0M", "512K", "100B"] {
            assert!(parse_mib(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("6s"), Ok(Duration::from_secs(6)));
        assert_eq!(parse_duration("1.5m"), Ok(Duration::from_secs(90)));
        for bad in ["", "6", "6sec", "-1s", "s", "99999999999999999999h"] {
            assert!(parse_duration(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn bytes_may_go_without_a_unit_and_seconds_are_whole() {
        assert_eq!(parse_bytes("100"), Ok(100));
        assert_eq!(parse_bytes("4K"), Ok(4096));
        assert!(parse_bytes("8G").is_err() && parse_bytes("-1").is_err() && parse_bytes("").is_err());
        assert_eq!(parse_seconds("1m"), Ok(60));
        assert!(parse_seconds("500ms").is_err() && parse_seconds("0s").is_err());
    }

    #[test]
    fn people_get_short_forms() {
        for (n, text) in
            [(0, "0 B"), (512, "512 B"), (1 << 20, "1 MiB"), (3 << 29, "1.5 GiB"), (u64::MAX, "16383.9 PiB")]
        {
            assert_eq!(bytes(n), text);
        }
        for (ms, text) in [
            (350, "350ms"),
            (6000, "6s"),
            (8250, "8.2s"),
            (250_000, "4m10s"),
            (300_000, "5m"),
            (11_100_000, "3h5m"),
            (90_000_000, "1d"),
        ] {
            assert_eq!(duration(Duration::from_millis(ms)), text);
        }
    }
}

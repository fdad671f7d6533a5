// Package entry is the text form of a log entry, shared by the drivers that store
// an entry, or push it, as one run of bytes. docs/wire.md describes it.
//
//	D1 <epoch> <seq> <count> <id> <prev> <time> <m|c>\n<data>
//
// Numbers are decimal, IDs are 32 hexadecimal digits, m is a frame of messages, c
// the close marker. A line of text, because scripts inside a server have to write
// it, and people with redis-cli have to read it.
package entry

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"strconv"

	"github.com/dchannel/dchannel"
)

const version = "D1"

// maxHeader bounds the line: what is longer is not ours.
const maxHeader = 256

// ErrForeign is wrapped by Parse's errors: the bytes are not a dchannel entry.
var ErrForeign = errors.New("not a dchannel entry")

// Append appends e's text form to dst and returns the extended slice.
func Append(dst []byte, e dchannel.Entry) []byte {
	dst = append(dst, version...)
	dst = strconv.AppendUint(append(dst, ' '), e.Epoch, 10)
	dst = strconv.AppendUint(append(dst, ' '), e.Seq, 10)
	dst = strconv.AppendInt(append(dst, ' '), int64(e.Count), 10)
	dst = hex.AppendEncode(append(dst, ' '), e.ID[:])
	dst = hex.AppendEncode(append(dst, ' '), e.Prev[:])
	dst = strconv.AppendInt(append(dst, ' '), e.Time, 10)
	if e.Closed {
		return append(dst, " c\n"...)
	}
	return append(append(dst, " m\n"...), e.Data...)
}

// Parse reads what Append wrote. The entry's Data aliases b.
func Parse(b []byte) (e dchannel.Entry, err error) {
	end := bytes.IndexByte(b[:min(len(b), maxHeader)], '\n')
	if end < 0 {
		return e, fmt.Errorf("%w: no header line", ErrForeign)
	}
	var f [8][]byte
	rest, ok := b[:end], true
	for i := range f {
		if !ok {
			return e, fmt.Errorf("%w: %d header fields, want %d", ErrForeign, i, len(f))
		}
		f[i], rest, ok = bytes.Cut(rest, []byte{' '})
	}
	if ok {
		return e, fmt.Errorf("%w: more than %d header fields", ErrForeign, len(f))
	}
	if string(f[0]) != version {
		return e, fmt.Errorf("%w: version is not %s", ErrForeign, version)
	}
	var count uint64
	for _, n := range []struct {
		name string
		text []byte
		to   *uint64
		max  uint64
	}{
		{"epoch", f[1], &e.Epoch, math.MaxUint64},
		{"seq", f[2], &e.Seq, math.MaxUint64},
		{"count", f[3], &count, math.MaxInt32},
	} {
		if *n.to, err = strconv.ParseUint(string(n.text), 10, 64); err != nil || *n.to == 0 || *n.to > n.max {
			return e, fmt.Errorf("%w: %s is not a number from 1 to %d", ErrForeign, n.name, n.max)
		}
	}
	if count > e.Seq {
		return e, fmt.Errorf("%w: count %d is above seq %d", ErrForeign, count, e.Seq)
	}
	e.Count = int(count)
	if !ParseID(&e.ID, f[4]) || !ParseID(&e.Prev, f[5]) {
		return e, fmt.Errorf("%w: an id is not 32 hexadecimal digits", ErrForeign)
	}
	if e.Time, err = strconv.ParseInt(string(f[6]), 10, 64); err != nil {
		return e, fmt.Errorf("%w: time is not a number", ErrForeign)
	}
	switch string(f[7]) {
	case "m":
		e.Data = b[end+1:]
	case "c":
		e.Closed = true
		if count != 1 {
			return e, fmt.Errorf("%w: a close marker with count %d", ErrForeign, count)
		}
	default:
		return e, fmt.Errorf("%w: kind is neither m nor c", ErrForeign)
	}
	return e, nil
}

// ParseID reads an ID's hexadecimal form, as ID.String writes it.
func ParseID(id *dchannel.ID, text []byte) bool {
	if len(text) != hex.EncodedLen(len(id)) {
		return false
	}
	_, err := hex.Decode(id[:], text)
	return err == nil
}

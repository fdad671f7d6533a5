package frame_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel/internal/frame"
)

var records = []frame.Record{
	{Kind: frame.Bytes, Payload: []byte{}},
	{Kind: frame.String, Payload: []byte("a\x00\xff")},
	{Kind: frame.JSON, Payload: []byte(`{"a":1}`), Headers: []string{"traceparent", "00-1", "", ""}},
	{Kind: frame.Custom, Codec: "gob", Payload: make([]byte, 300)},
}

func encode(recs []frame.Record) []byte {
	b := frame.Begin(nil)
	for _, r := range recs {
		before := len(b)
		b = frame.Append(b, r)
		if len(b)-before > len(r.Payload)+frame.Overhead(r) {
			panic("Overhead is no upper bound")
		}
	}
	return b
}

func decode(b []byte) (recs []frame.Record, err error) {
	r, err := frame.Open(b)
	for err == nil && r.More() {
		var rec frame.Record
		if rec, err = r.Next(); err == nil {
			recs = append(recs, rec)
		}
	}
	return recs, err
}

func TestReaderReadsWhatAppendWrote(t *testing.T) {
	got, err := decode(encode(records))
	require.NoError(t, err)
	require.Equal(t, records, got)
}

func TestEveryCutIsNoticedOrAtARecordsEnd(t *testing.T) {
	whole := encode(records)
	ends := map[int]bool{}
	for i := range records {
		ends[len(encode(records[:i]))] = true
	}
	for n := range whole {
		_, err := decode(whole[:n])
		if ends[n] {
			require.NoError(t, err)
		} else {
			require.ErrorIs(t, err, frame.ErrCorrupt, "cut at %d", n)
		}
	}
}

func FuzzReader(f *testing.F) {
	f.Add(encode(records))
	f.Add([]byte{1, 0x82, 0xff, 0xff, 0xff, 0xff, 0x0f})
	f.Fuzz(func(t *testing.T, b []byte) {
		recs, err := decode(b)
		if err != nil {
			require.ErrorIs(t, err, frame.ErrCorrupt)
			return
		}
		again, err := decode(encode(recs))
		require.NoError(t, err)
		require.Len(t, again, len(recs))
		for i := range recs {
			require.Equal(t, string(recs[i].Payload), string(again[i].Payload))
		}
	})
}

package entry_test

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/internal/entry"
)

var (
	message = dchannel.Entry{
		Position: dchannel.Position{Epoch: 1732411111000000, Seq: 42}, Count: 3,
		ID: dchannel.NewID(), Prev: dchannel.NewID(), Time: 1732411111000, Data: []byte("a\n b\x00\xff"),
	}
	marker = dchannel.Entry{
		Position: dchannel.Position{Epoch: 7, Seq: 1}, Count: 1, ID: dchannel.NewID(), Time: -1, Closed: true,
	}
)

func TestParseReadsWhatAppendWrote(t *testing.T) {
	for _, want := range []dchannel.Entry{message, marker} {
		got, err := entry.Parse(entry.Append(nil, want))
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
}

func TestParseRefusesWhatIsForeign(t *testing.T) {
	good := string(entry.Append(nil, marker))
	id := marker.ID.String()
	for _, bad := range []string{
		"", "\n", "hello", "D1\n", good[:len(good)-1], "D2" + good[2:], good[:len(good)-1] + " x\n",
		"D1 7 1 1 " + id + " " + id + " 0 x\n",
		"D1 7 1 2 " + id + " " + id + " 0 m\n",
		"D1 7 2 2 " + id + " " + id + " 0 c\n",
		"D1 0 1 1 " + id + " " + id + " 0 c\n",
		"D1 7 0 1 " + id + " " + id + " 0 c\n",
		"D1 7 1 0 " + id + " " + id + " 0 c\n",
		"D1 7 1 -1 " + id + " " + id + " 0 c\n",
		"D1 7 1 1 " + id[1:] + " " + id + " 0 c\n",
		"D1 7 1 1 z" + id[1:] + " " + id + " 0 c\n",
		"D1 7 1 1 " + id + " " + id + " x c\n",
	} {
		_, err := entry.Parse([]byte(bad))
		require.ErrorIs(t, err, entry.ErrForeign, "%q", bad)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(entry.Append(nil, message))
	f.Add(entry.Append(nil, marker))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := entry.Parse(b)
		if err != nil {
			return
		}
		again, err := entry.Parse(entry.Append(nil, e))
		require.NoError(t, err)
		require.True(t, bytes.Equal(e.Data, again.Data))
		e.Data, again.Data = nil, nil
		require.Equal(t, e, again)
	})
}

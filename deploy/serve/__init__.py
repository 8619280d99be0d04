"""The teacher under Ray Serve. Imports `common` and `teacher_server.http.serve`."""
